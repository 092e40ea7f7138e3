// What module.cpp puts into mor_ext._engine.
//
// Arrays cross the border without copies: a result is a view of the C++ object's own memory, kept
// alive by it and valid until its next call; an argument of the right dtype is read in place.
#pragma once

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <span>
#include <vector>

namespace mor::engine {

void bind_blocks(pybind11::module_& m);
void bind_scheduler(pybind11::module_& m);

using ReleaseGil = pybind11::call_guard<pybind11::gil_scoped_release>;

template <typename T>
using Array = pybind11::array_t<T, pybind11::array::c_style | pybind11::array::forcecast>;

template <typename T>
std::span<const T> span_of(const Array<T>& array) {
  return {array.data(), static_cast<size_t>(array.size())};
}

// A view of `values`, which `owner` owns, in the given shape.
template <typename T>
pybind11::array view_of(std::span<const T> values, const pybind11::handle& owner,
                        std::vector<pybind11::ssize_t> shape = {}) {
  if (shape.empty()) {
    shape = {static_cast<pybind11::ssize_t>(values.size())};
  }
  return pybind11::array_t<T>(std::move(shape), values.data(), owner);
}

// A read-only property that views a vector that `get` finds in the C++ object.
template <typename Class, typename Get>
void def_view(Class& c, const char* name, Get get) {
  using Object = typename Class::type;
  c.def_property_readonly(name, [get](const pybind11::object& self) {
    const auto& values = get(self.cast<const Object&>());
    using T = typename std::decay_t<decltype(values)>::value_type;
    return view_of<T>(values, self);
  });
}

}  // namespace mor::engine
