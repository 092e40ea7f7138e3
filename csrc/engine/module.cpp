// mor_ext._engine: host-side C++ of the inference engine, bound with pybind11, free of torch.
#include <pybind11/pybind11.h>

PYBIND11_MODULE(_engine, m) {
  m.doc() = "Host-side C++ of the mor_ext inference engine.";
  pybind11::dict build;
  build["version"] = MOR_VERSION;
  build["compiler"] = MOR_COMPILER;
  build["torch"] = MOR_TORCH_VERSION;
  m.attr("build_info") = build;
}
