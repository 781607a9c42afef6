// Python's door to the CUDA engine. Tables come as buffers, memory that torch owns as addresses, streams as integers:
// no torch headers, so that one build serves every torch. Importing it needs no GPU and no driver.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <memory>

#include "buffers.h"
#include "cuda/engine.h"

namespace py = pybind11;
using namespace layerfused;
using cuda::Engine;

namespace {

std::unique_ptr<Engine> make(const std::string& rule, py::buffer items, py::buffer chunks, py::buffer layers,
                             int64_t tensors, int64_t groups) {
  return std::make_unique<Engine>(rule, rows<Item>(items), rows<Chunk>(chunks), rows<Layer>(layers), tensors, groups);
}

cudaStream_t stream_of(uint64_t stream) { return reinterpret_cast<cudaStream_t>(stream); }

void give(Engine& engine, uint64_t stream, py::buffer addresses, py::buffer types, py::buffer numbers,
          py::buffer places, py::buffer predicted) {
  const cuda::Words& w = engine.words();
  engine.give({column<int64_t>(addresses, 4 * w.tensors, "addresses"), column<int64_t>(types, w.tensors, "types"),
               column<double>(numbers, w.numbers, "numbers"), column<int64_t>(places, w.numbers, "places"),
               predicted.request().size ? column<int64_t>(predicted, w.tensors, "predicted") : nullptr},
              stream_of(stream));
}

void set_precision(Engine& engine, py::buffer rests, py::buffer seeds, py::buffer places) {
  const int64_t tensors = engine.words().tensors;
  engine.set_precision(column<int64_t>(rests, tensors, "rests"), column<int64_t>(seeds, tensors, "seeds"),
                       column<int64_t>(places, tensors, "places"));
}

std::vector<std::string> names() {
  std::vector<std::string> all;
  for (const cuda::Kernels* rule : cuda::rules()) all.push_back(rule->name);
  return all;
}

}  // namespace

PYBIND11_MODULE(_cuda, module) {
  module.doc() = "layerfused's CUDA engine";
  module.def("rules", &names);
  module.attr("TILE") = cuda::TILE;
  module.attr("WHOLE") = cuda::WHOLE;
  module.attr("ARCHITECTURES") = LAYERFUSED_CUDA_ARCHS;  // that it was built for, as "80 90 100"
  py::class_<Engine>(module, "Engine")
      .def(py::init(&make))
      .def("bind", [](Engine& engine, int device, int64_t workspace,
                      uint64_t stream) { engine.bind(device, workspace, stream_of(stream)); })
      .def("set_outputs", [](Engine& engine, int64_t step, int64_t state, int64_t stats, int64_t report,
                             int64_t norm) { engine.out = {step, state, stats, report, norm}; })
      .def("set_precision", &set_precision)
      .def("give", &give)
      .def("run",
           [](Engine& engine, unsigned phases, uint64_t stream, bool clip, int64_t skipped, int64_t grad_scale,
              int64_t found_inf) {
             engine.run(phases, {clip, skipped, grad_scale, found_inf}, stream_of(stream));
           })
      .def_readwrite("blocks", &Engine::blocks)
      .def_property_readonly("host_bytes", &Engine::host_bytes)
      .def_property_readonly("workspace_bytes", &Engine::workspace_bytes);
}
