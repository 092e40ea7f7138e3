// mor_ext._engine: host-side C++ of the inference engine, bound with pybind11, free of torch.
#include <pybind11/pybind11.h>

#include "common/cpu_isa.h"
#include "engine/bindings.h"

PYBIND11_MODULE(_engine, m) {
  m.doc() = "Host-side C++ of the mor_ext inference engine.";

  pybind11::dict build;
  build["version"] = MOR_VERSION;
  build["compiler"] = MOR_COMPILER;
  build["torch"] = MOR_TORCH_VERSION;
  build["cuda"] = MOR_CUDA;
  m.attr("build_info") = build;

  pybind11::list isas;
  for (const char* isa : mor::available_cpu_isas()) {
    isas.append(isa);
  }
  m.attr("available_cpu_isas") = isas;
  m.attr("cpu_isa") = mor::cpu_isa_name();

  mor::engine::bind_blocks(m);
  mor::engine::bind_scheduler(m);
}
