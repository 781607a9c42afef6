// Python's door to the CPU engine. Tables come as buffers, memory that torch owns as addresses: no torch headers, so
// that one build serves every torch.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <stdexcept>
#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "buffers.h"
#include "cpu/engine.h"
#include "cpu/reader.h"

namespace py = pybind11;
using namespace layerfused;

namespace {

template <class T>
T* at(int64_t address) { return reinterpret_cast<T*>(address); }

// Where the states lie: an engine and the arrays it points into.
struct Bound {
  std::unique_ptr<Engine> engine;
  std::vector<int64_t> m, v, m_storage, v_storage;
  std::vector<int64_t> p, predicted;  // of true and of predicted weights where it leads, else empty
  std::vector<int64_t> rest, seeds, places;
};

std::unique_ptr<Bound> make(const std::string& rule, py::buffer items, py::buffer chunks, py::buffer layers,
                            int64_t tensors) {
  auto engine = std::make_unique<Engine>(rule, rows<Item>(items), rows<Chunk>(chunks), rows<Layer>(layers), tensors);
  return std::make_unique<Bound>(Bound{std::move(engine), {}, {}, {}, {}, {}, {}, {}, {}, {}});
}

void set_states(Bound& bound, py::buffer m, py::buffer m_storage, py::buffer v, py::buffer v_storage) {
  bound.m = rows<int64_t>(m), bound.m_storage = rows<int64_t>(m_storage);
  bound.v = rows<int64_t>(v), bound.v_storage = rows<int64_t>(v_storage);
  for (const auto* column : {&bound.m, &bound.m_storage, &bound.v, &bound.v_storage})
    if (int64_t(column->size()) != bound.engine->tensors())
      throw std::invalid_argument("states need one address and one storage type per tensor");
  bound.engine->m = {bound.m.data(), bound.m_storage.data()};
  bound.engine->v = {bound.v.data(), bound.v_storage.data()};
}

// Where the rests of the parameters lie that have one, and what noise of a tensor's is drawn by (see philox.h).
void set_precision(Bound& bound, py::buffer rest, py::buffer seeds, py::buffer places) {
  bound.rest = rows<int64_t>(rest), bound.seeds = rows<int64_t>(seeds), bound.places = rows<int64_t>(places);
  for (const auto* column : {&bound.rest, &bound.seeds, &bound.places})
    if (int64_t(column->size()) != bound.engine->tensors())
      throw std::invalid_argument("rests, seeds and places need one number per tensor");
  bound.engine->ways = {bound.rest.data(), bound.seeds.data(), bound.places.data()};
}

void set_outputs(Bound& bound, int64_t step, int64_t state, int64_t stats, int64_t report, int64_t norm) {
  bound.engine->out = {at<float>(step), at<double>(state), at<double>(stats), at<double>(report), at<double>(norm)};
}

// From now on the weights at addresses `p` are read and written, and predictions of them written to `predicted`, which
// may be empty: to the parameters. With no addresses `p` it leads no longer.
void lead(Bound& bound, py::buffer p, py::buffer predicted, float ahead) {
  bound.p = rows<int64_t>(p), bound.predicted = rows<int64_t>(predicted), bound.engine->ahead = ahead;
  const size_t tensors = size_t(bound.engine->tensors());
  const auto fits = [tensors](const std::vector<int64_t>& column) { return column.empty() || column.size() == tensors; };
  if (!fits(bound.p) || !fits(bound.predicted))
    throw std::invalid_argument("true and predicted weights need one address per tensor");
}

bool run(Bound& bound, unsigned phases, const Reader& reader, py::buffer groups, double max_norm, int threads) {
  Engine& engine = *bound.engine;
  if (int64_t(reader.p.size()) != engine.tensors()) throw std::invalid_argument("reader and plan differ in tensors");
  const bool leads = !bound.p.empty();
  engine.p = {leads ? bound.p.data() : reader.p.data(), reader.p_storage.data()};
  engine.predicted = {!leads ? nullptr : bound.predicted.empty() ? reader.p.data() : bound.predicted.data(),
                      reader.p_storage.data()};
  engine.g = {reader.g.data(), reader.g_storage.data()};
  const std::vector<double> table = rows<double>(groups);
  if (table.size() % size_t(engine.rule().hyper + 1)) throw std::invalid_argument("rows do not fit the rule");
  py::gil_scoped_release release;
  return engine.run(phases, table.data(), max_norm, threads);
}

// Asks for 2 MiB pages under memory that has not been touched yet. A step streams through four arrays at once and with
// 4 KiB pages misses the TLB on each: AdamW from DRAM took 1.25 ns an element, with large pages 0.97.
void prefer_huge_pages(int64_t address, int64_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr int64_t page = 2 << 20;
  const int64_t begin = (address + page - 1) / page * page, end = (address + bytes) / page * page;
  if (begin < end) madvise(reinterpret_cast<void*>(begin), size_t(end - begin), MADV_HUGEPAGE);  // refused: as before
#else
  (void)address, (void)bytes;
#endif
}

// The needs of every rule, so that Python can check its own table against them.
py::dict describe() {
  py::dict all;
  for (const Kernels* k : rules()) {
    py::dict one;
    one["hyper"] = k->hyper, one["sums"] = k->sums, one["minima"] = k->minima, one["reports"] = k->reports;
    one["couples"] = k->couples;
    one["reduce"] = py::make_tuple(k->reduce_sweep.reads, k->reduce_sweep.writes);
    one["apply"] = py::make_tuple(k->apply_sweep.reads, k->apply_sweep.writes);
    all[k->name] = one;
  }
  return all;
}

}  // namespace

PYBIND11_MODULE(_cpu, module) {
  module.doc() = "layerfused's CPU engine";
  module.def("rules", &describe);
  module.def("prefer_huge_pages", &prefer_huge_pages);
  module.def("same", &same, "whether two lists hold the same objects");
  py::class_<Reader>(module, "Reader")
      .def(py::init<py::list, py::list, py::tuple, int>(), py::arg("parameters"), py::arg("states"), py::arg("names"),
           py::arg("elementwise") = 0)
      .def("set_ways", &Reader::set_ways)
      .def("read", &Reader::read)
      .def("release", &Reader::release)
      .def("replace_gradient", &Reader::replace_gradient)
      .def("addresses", &Reader::addresses)
      .def("types", &Reader::types)
      .def_readonly("g_storage", &Reader::g_storage)
      .def_property_readonly("workspace_bytes", &Reader::workspace_bytes);
  py::class_<Bound>(module, "Engine")
      .def(py::init(&make))
      .def("set_states", &set_states)
      .def("set_precision", &set_precision)
      .def("set_outputs", &set_outputs)
      .def("lead", &lead)
      .def("run", &run)
      .def_property_readonly("workspace_bytes", [](const Bound& bound) { return bound.engine->workspace_bytes(); });
}
