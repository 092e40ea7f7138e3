// The scheduler and what it hands out at each stage of a step.
#include <pybind11/stl.h>

#include <optional>
#include <string>
#include <utility>

#include "engine/bindings.h"
#include "engine/scheduler.h"

namespace mor::engine {

namespace py = pybind11;

namespace {

using Flags = std::optional<Array<bool>>;

KvStrategy strategy_of(const std::string& name) {
  const std::pair<const char*, KvStrategy> names[] = {
      {"recursion_wise", KvStrategy::kRecursionWise},
      {"shared", KvStrategy::kShared},
      {"hybrid", KvStrategy::kHybrid},
      {"frozen", KvStrategy::kFrozen}};
  for (const auto& [known, strategy] : names) {
    if (name == known) {
      return strategy;
    }
  }
  throw std::invalid_argument(
      "kv_strategy must be recursion_wise, shared, hybrid or frozen, got '" + name + "'");
}

std::unique_ptr<Scheduler> make_scheduler(const std::vector<std::pair<int32_t, int32_t>>& stages,
                                          const std::string& kv_strategy, int32_t num_blocks,
                                          int32_t max_batch, int32_t token_budget, bool depthwise,
                                          bool share_prefixes) {
  std::vector<Stage> list;
  for (const auto& [layers, recursions] : stages) {
    list.push_back({.layers = layers, .recursions = recursions});
  }
  return std::make_unique<Scheduler>(Layout(std::move(list), strategy_of(kv_strategy), depthwise),
                                     Limits{.num_blocks = num_blocks,
                                            .max_batch = max_batch,
                                            .token_budget = token_budget,
                                            .share_prefixes = share_prefixes});
}

std::span<const bool> span_of(const Flags& flags) {
  return flags ? engine::span_of<bool>(*flags) : std::span<const bool>();
}

void bind_pass(py::module_& m) {
  py::class_<Entry> entry(m, "Entry", "Tokens at the entry of a stage.");
  def_view(entry, "rows", [](const Entry& e) -> auto& { return e.rows; });
  def_view(entry, "positions", [](const Entry& e) -> auto& { return e.positions; });
  def_view(entry, "ids", [](const Entry& e) -> auto& { return e.ids; });

  py::class_<Pass> pass(m, "Pass", "What goes through a stage's block at once, of all depths.");
  def_view(pass, "rows", [](const Pass& p) -> auto& { return p.rows; });
  def_view(pass, "positions", [](const Pass& p) -> auto& { return p.positions; });
  def_view(pass, "depths", [](const Pass& p) -> auto& { return p.depths; });
  def_view(pass, "key_limit", [](const Pass& p) -> auto& { return p.key_limit; });
  def_view(pass, "cu_rows", [](const Pass& p) -> auto& { return p.cu_rows; });
  def_view(pass, "before", [](const Pass& p) -> auto& { return p.before; });
  def_view(pass, "after", [](const Pass& p) -> auto& { return p.after; });
  def_view(pass, "exited_rows", [](const Pass& p) -> auto& { return p.exited_rows; });
  def_view(pass, "exited_positions", [](const Pass& p) -> auto& { return p.exited_positions; });
  const auto by_layer = [&](const char* name, auto get, auto rest) {
    pass.def_property_readonly(name, [get, rest](const py::object& self) {
      const auto& p = self.cast<const Pass&>();
      std::vector<py::ssize_t> shape = rest(p);
      shape.insert(shape.begin(), p.layers);
      return view_of<int32_t>(get(p), self, std::move(shape));
    });
  };
  using Shape = std::vector<py::ssize_t>;
  by_layer(
      "tables", [](const Pass& p) -> auto& { return p.tables; },
      [](const Pass& p) { return Shape{p.groups(), p.pages}; });
  by_layer(
      "writes", [](const Pass& p) -> auto& { return p.writes; },
      [](const Pass& p) { return Shape{static_cast<py::ssize_t>(p.writes.size()) / p.layers}; });
  by_layer(
      "exited_writes", [](const Pass& p) -> auto& { return p.exited_writes; },
      [](const Pass& p) { return Shape{static_cast<py::ssize_t>(p.exited_rows.size())}; });
  // On the host, where they are sizes.
  pass.def_readonly("depth_rows", &Pass::depth_rows)
      .def_readonly("longest", &Pass::longest)
      .def_readonly("first_groups", &Pass::first_groups)
      .def_readonly("block_copies", &Pass::block_copies)
      .def_readonly("carried", &Pass::carried);

  py::class_<Carry>(m, "Carry", "What is to be copied after a pass, blocks first.")
      .def_readonly("blocks", &Carry::blocks)
      .def_readonly("entries", &Carry::entries);
}

}  // namespace

void bind_scheduler(py::module_& m) {
  bind_pass(m);

  py::class_<Sampled> sampled(m, "Sampled", "Sequences whose next token is to be sampled.");
  def_view(sampled, "ids", [](const Sampled& s) -> auto& { return s.ids; });
  def_view(sampled, "rows", [](const Sampled& s) -> auto& { return s.rows; });

  py::class_<Counters>(m, "Counters")
      .def_readonly("steps", &Counters::steps)
      .def_readonly("preemptions", &Counters::preemptions)
      .def_readonly("tokens", &Counters::tokens)
      .def_readonly("shared_tokens", &Counters::shared_tokens)
      .def_readonly("evictions", &Counters::evictions);

  using py::arg;
  const auto internal = py::return_value_policy::reference_internal;
  py::class_<Scheduler>(m, "Scheduler", "Who runs; csrc/engine/scheduler.h has the whole contract.")
      .def(py::init(&make_scheduler), arg("stages"), arg("kv_strategy"), arg("num_blocks"),
           arg("max_batch"), arg("token_budget"), arg("depthwise") = true,
           arg("share_prefixes") = true, "stages: (layers, recursions) of each.")
      .def("fits", &Scheduler::fits, arg("tokens"))
      .def(
          "submit",
          [](Scheduler& s, int64_t id, const Array<int32_t>& prompt, int32_t priority) {
            s.submit(id, engine::span_of<int32_t>(prompt), priority);
          },
          arg("id"), arg("prompt"), arg("priority") = 0)
      .def("cancel", &Scheduler::cancel, arg("id"))
      .def("plan", &Scheduler::plan, ReleaseGil())
      .def(
          "enter",
          [](Scheduler& s, int32_t stage) -> const Entry& { return s.walk().enter(stage); },
          arg("stage"), internal, ReleaseGil())
      .def(
          "choose",
          [](Scheduler& s, const Flags& keep) {
            const std::span<const bool> flags = span_of(keep);
            const py::gil_scoped_release release;
            s.walk().choose(flags);
          },
          arg("keep") = py::none())
      .def(
          "run",
          [](Scheduler& s, int32_t stage) -> const Pass* {
            return s.walk().run(stage) ? &s.walk().pass() : nullptr;
          },
          arg("stage"), internal, ReleaseGil())
      .def(
          "advance",
          [](Scheduler& s, const Flags& keep) -> const Carry& {
            const std::span<const bool> flags = span_of(keep);
            const py::gil_scoped_release release;
            return s.walk().advance(flags);
          },
          arg("keep") = py::none(), internal)
      .def("finish_step", &Scheduler::finish_step, internal, ReleaseGil())
      .def(
          "append",
          [](Scheduler& s, const Array<int64_t>& ids, const Array<int32_t>& tokens) {
            s.append(engine::span_of<int64_t>(ids), engine::span_of<int32_t>(tokens));
          },
          arg("ids"), arg("tokens"))
      .def("finish", &Scheduler::finish, arg("id"), arg("keep") = true)
      .def("drop_kept", &Scheduler::drop_kept)
      .def(
          "depth",
          [](const py::object& self, int64_t id) {
            const auto& s = self.cast<const Scheduler&>();
            const std::span<const uint8_t> depth = s.depth(id);
            const int32_t stages = s.layout().num_stages();
            return view_of<uint8_t>(depth, self,
                                    {static_cast<py::ssize_t>(depth.size()) / stages, stages});
          },
          arg("id"))
      .def("check", &Scheduler::check)
      .def_property_readonly("counters", &Scheduler::counters, internal)
      .def_property_readonly("num_running", &Scheduler::num_running)
      .def_property_readonly("num_waiting", &Scheduler::num_waiting)
      .def_property_readonly("num_kept", &Scheduler::num_kept)
      .def_property_readonly("num_slots_free", &Scheduler::num_slots_free)
      .def_property_readonly("num_blocks", [](const Scheduler& s) { return s.pool().num_blocks(); })
      .def_property_readonly("num_blocks_free",
                             [](const Scheduler& s) { return s.pool().num_free(); })
      .def_property_readonly("num_blocks_kept",
                             [](const Scheduler& s) { return s.pool().num_kept(); });
}

}  // namespace mor::engine
