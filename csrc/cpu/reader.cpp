#include "cpu/reader.h"

#include <algorithm>

#include "cpu/dlpack.h"
#include "cpu/storage.h"

namespace py = pybind11;

namespace layerfused {
namespace {

PyObject* name(const char* text) { return PyUnicode_InternFromString(text); }

// The exchange table of this tensor type, looked up once per type; nullptr where torch has none.
const dlpack::Exchange* exchange_of(PyObject* tensor) {
  static PyTypeObject* last = nullptr;
  static const dlpack::Exchange* table = nullptr;
  if (Py_TYPE(tensor) == last) return table;
  static PyObject* attribute = name("__dlpack_c_exchange_api__");
  const auto capsule = py::reinterpret_steal<py::object>(PyObject_GetAttr((PyObject*)Py_TYPE(tensor), attribute));
  table = nullptr;
  if (capsule && PyCapsule_CheckExact(capsule.ptr()))
    table = static_cast<const dlpack::Exchange*>(PyCapsule_GetPointer(capsule.ptr(), "dlpack_exchange_api"));
  PyErr_Clear();
  if (table && (table->version.major != 1 || !table->look)) table = nullptr;
  last = Py_TYPE(tensor);
  return table;
}

bool look_by_exchange(const dlpack::Exchange& table, PyObject* tensor, Layout& out) {
  dlpack::Tensor view;
  if (table.look(tensor, &view) != 0) return PyErr_Clear(), false;
  out.address = reinterpret_cast<int64_t>(view.data) + static_cast<int64_t>(view.byte_offset);
  out.cpu = view.device.type == dlpack::CPU;
  out.storage = NOT_SERVED;
  if (view.type.code == dlpack::FLOAT && view.type.bits == 32) out.storage = FP32;
  if (view.type.code == dlpack::BFLOAT && view.type.bits == 16) out.storage = BF16;
  if (view.type.code == dlpack::FLOAT && view.type.bits == 16) out.storage = FP16;
  out.shape.assign(view.shape, view.shape + view.dimensions);
  out.strides.assign(view.strides, view.strides + view.dimensions);
  return true;
}

bool look_by_methods(PyObject* tensor, Layout& out) {
  try {
    const py::handle t(tensor);
    const std::string type = py::str(t.attr("dtype"));
    out.address = t.attr("data_ptr")().cast<int64_t>();
    out.cpu = t.attr("device").attr("type").cast<std::string>() == "cpu";
    out.storage = NOT_SERVED;
    if (type == "torch.float32") out.storage = FP32;
    if (type == "torch.bfloat16") out.storage = BF16;
    if (type == "torch.float16") out.storage = FP16;
    out.shape.clear(), out.strides.clear();
    for (auto size : t.attr("shape")) out.shape.push_back(size.cast<int64_t>());
    for (auto stride : t.attr("stride")()) out.strides.push_back(stride.cast<int64_t>());
    return true;
  } catch (py::error_already_set&) {  // a layout without strides (sparse): Python says what is wrong with it
    return false;
  }
}

}  // namespace

bool Reader::look(PyObject* tensor, Layout& out) {
  const dlpack::Exchange* table = exchange_of(tensor);
  if (!(table ? look_by_exchange(*table, tensor, out) : look_by_methods(tensor, out))) return false;
  for (size_t k = 0; k < out.shape.size(); ++k)
    if (out.shape[k] <= 1) out.strides[k] = 0;  // says nothing about where the elements lie
  return true;
}

Reader::Reader(py::list parameters, py::list states, py::tuple names)
    : p(parameters.size()), g(parameters.size()), p_storage(parameters.size()), g_storage(parameters.size()),
      parameters_(parameters), states_(states), names_(names), expected_(parameters.size()) {
  for (size_t i = 0; i < parameters_.size(); ++i) {
    if (!look(parameters_[i].ptr(), expected_[i])) throw py::value_error("parameter " + std::to_string(i) + " has no layout");
    p_storage[i] = g_storage[i] = expected_[i].storage;
    for (auto key : names_) {
      entries_.push_back(py::reinterpret_borrow<py::object>(states_[i][key]));
    }
  }
}

py::tuple Reader::read() {
  static PyObject* grad = name("grad");
  py::list changed, odd;
  bool moved = false;
  int64_t absent = 0;
  Layout now;
  auto entry = entries_.begin();
  for (size_t i = 0; i < expected_.size(); ++i) {
    const Layout& expected = expected_[i];
    PyObject* parameter = PyList_GET_ITEM(parameters_.ptr(), Py_ssize_t(i));
    bool intact = look(parameter, now) && now.storage == expected.storage && now.cpu == expected.cpu && now.same_shape(expected);
    moved |= p[i] != now.address;
    p[i] = now.address;
    for (Py_ssize_t k = 0; k < PyTuple_GET_SIZE(names_.ptr()); ++k, ++entry)
      intact &= PyDict_GetItem(PyList_GET_ITEM(states_.ptr(), Py_ssize_t(i)), PyTuple_GET_ITEM(names_.ptr(), k)) == entry->ptr();
    if (!intact) changed.append(i);
    const auto gradient = py::reinterpret_steal<py::object>(PyObject_GetAttr(parameter, grad));
    if (!gradient) throw py::error_already_set();
    g[i] = 0;
    if (gradient.is_none()) {
      ++absent;
      continue;
    }
    const bool serves = look(gradient.ptr(), now) && now.storage >= 0 && now.cpu == expected.cpu && now.same_shape(expected);
    if (!serves) {
      odd.append(i);
      continue;
    }
    g[i] = now.address ? now.address : -1;  // an empty gradient is there, though it has no memory
    g_storage[i] = now.storage;
  }
  return py::make_tuple(changed, odd, moved, absent);
}

int64_t Reader::workspace_bytes() const {
  int64_t bytes = int64_t(p.size() * 4 * 8 + entries_.size() * sizeof(py::object));
  for (const Layout& one : expected_) bytes += int64_t(sizeof(Layout) + one.shape.size() * 16);
  return bytes;
}

void Reader::replace_gradient(size_t index, int64_t address, int64_t storage) {
  g.at(index) = address, g_storage.at(index) = storage;
}

bool same(const py::list& a, const py::list& b) {
  const Py_ssize_t n = PyList_GET_SIZE(a.ptr());
  if (n != PyList_GET_SIZE(b.ptr())) return false;
  for (Py_ssize_t i = 0; i < n; ++i)
    if (PyList_GET_ITEM(a.ptr(), i) != PyList_GET_ITEM(b.ptr(), i)) return false;
  return true;
}

}  // namespace layerfused
