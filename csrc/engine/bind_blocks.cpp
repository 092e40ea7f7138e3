// BlockPool and Lane, for whoever manages K/V without the scheduler.
#include "engine/bindings.h"
#include "engine/block_pool.h"
#include "engine/lane.h"

namespace mor::engine {

namespace py = pybind11;

void bind_blocks(py::module_& m) {
  m.attr("BLOCK_SIZE") = kBlockSize;

  py::class_<BlockPool>(m, "BlockPool", "Physical blocks, each free or used by lanes.")
      .def(py::init<int32_t>(), py::arg("num_blocks"))
      .def_property_readonly("num_blocks", &BlockPool::num_blocks)
      .def_property_readonly("num_free", &BlockPool::num_free)
      .def_property_readonly("num_kept", &BlockPool::num_kept)
      .def("take", &BlockPool::take)
      .def("share", &BlockPool::share, py::arg("block"))
      .def("drop", &BlockPool::drop, py::arg("block"))
      .def("keep", &BlockPool::keep, py::arg("block"))
      .def("drop_kept", &BlockPool::drop_kept, py::arg("block"))
      .def("users", &BlockPool::users, py::arg("block"));

  py::class_<Copies> copies(m, "Copies", "What is to be copied: from source[i] to target[i].");
  copies.def(py::init<>()).def("__len__", [](const Copies& c) { return c.from.size(); });
  def_view(copies, "source", [](const Copies& c) -> auto& { return c.from; });
  def_view(copies, "target", [](const Copies& c) -> auto& { return c.to; });

  py::class_<Lane> lane(m, "Lane", "The K/V entries of a sequence at one depth of a stage.");
  lane.def(py::init<int32_t>(), py::arg("layers"))
      .def_property_readonly("entries", &Lane::entries)
      .def_property_readonly("pages", &Lane::pages)
      .def("address", &Lane::address, py::arg("layer"), py::arg("entry"))
      .def("blocks_to_append", &Lane::blocks_to_append, py::arg("pool"), py::arg("count"))
      .def("append", &Lane::append, py::arg("pool"), py::arg("count"), py::arg("copies"))
      .def("prefix", &Lane::prefix, py::arg("pool"), py::arg("entries"))
      .def("keep", &Lane::keep, py::arg("pool"), py::arg("entries"))
      .def("clear", &Lane::clear, py::arg("pool"));
  def_view(lane, "blocks", [](const Lane& l) -> auto& { return l.blocks(); });
}

}  // namespace mor::engine
