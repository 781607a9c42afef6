#include "cpu/reader.h"

#include <algorithm>

#include "cpu/dlpack.h"
#include "storage.h"

namespace py = pybind11;

namespace layerfused {
namespace {

PyObject* name(const char* text) { return PyUnicode_InternFromString(text); }

const dlpack::Exchange* find_exchange(PyTypeObject* type) {
  static PyObject* attribute = name("__dlpack_c_exchange_api__");
  const dlpack::Exchange* table = nullptr;
  const auto capsule = py::reinterpret_steal<py::object>(PyObject_GetAttr(reinterpret_cast<PyObject*>(type), attribute));
  if (capsule && PyCapsule_CheckExact(capsule.ptr()))
    table = static_cast<const dlpack::Exchange*>(PyCapsule_GetPointer(capsule.ptr(), "dlpack_exchange_api"));
  PyErr_Clear();
  return table && table->version.major == 1 && table->look ? table : nullptr;
}

// The exchange table of a tensor's type, nullptr where torch has none. Two types alternate, Parameter and Tensor.
const dlpack::Exchange* exchange_of(PyObject* tensor) {
  static struct { PyTypeObject* type; const dlpack::Exchange* table; } known[2];
  PyTypeObject* type = Py_TYPE(tensor);
  if (known[0].type == type) return known[0].table;
  if (known[1].type != type) {
    Py_INCREF(type);  // never freed, so that no other type can take its address
    known[1] = {type, find_exchange(type)};
  }
  std::swap(known[0], known[1]);
  return known[0].table;
}

int64_t storage_of(const dlpack::Tensor& view) {
  if (view.type.code == dlpack::FLOAT && view.type.bits == 32) return FP32;
  if (view.type.code == dlpack::BFLOAT && view.type.bits == 16) return BF16;
  if (view.type.code == dlpack::FLOAT && view.type.bits == 16) return FP16;
  return NOT_SERVED;
}

// The same view by method calls, its sizes kept in `sizes`; false for a tensor without strides (sparse), of which
// Python says what is wrong with it.
bool look_by_methods(PyObject* tensor, dlpack::Tensor& view, std::vector<int64_t>& sizes) {
  try {
    const py::handle t(tensor);
    const std::string type = py::str(t.attr("dtype"));
    view.data = reinterpret_cast<void*>(t.attr("data_ptr")().cast<int64_t>());
    view.byte_offset = 0;
    const py::object device = t.attr("device"), number = device.attr("index");
    // Equal where the devices are; of what DLPack calls them only the CPU's number is kept.
    view.device.type = device.attr("type").cast<std::string>() == "cpu" ? dlpack::CPU : int32_t(py::hash(device.attr("type")));
    view.device.id = number.is_none() ? 0 : number.cast<int32_t>();
    view.type.bits = type == "torch.float32" ? 32 : type == "torch.float16" || type == "torch.bfloat16" ? 16 : 0;
    view.type.code = type == "torch.bfloat16" ? dlpack::BFLOAT : dlpack::FLOAT;
    sizes.clear();
    for (auto size : t.attr("shape")) sizes.push_back(size.cast<int64_t>());
    view.dimensions = static_cast<int32_t>(sizes.size());
    for (auto stride : t.attr("stride")()) sizes.push_back(stride.cast<int64_t>());
    view.shape = sizes.data(), view.strides = sizes.data() + view.dimensions;
    return true;
  } catch (py::error_already_set&) {
    return false;
  }
}

bool look(PyObject* tensor, dlpack::Tensor& view) {
  if (const dlpack::Exchange* table = exchange_of(tensor)) return table->look(tensor, &view) == 0 || (PyErr_Clear(), false);
  static std::vector<int64_t> sizes;  // under the GIL, and read before the next look
  return look_by_methods(tensor, view, sizes);
}

int64_t address_of(const dlpack::Tensor& view) {
  return reinterpret_cast<int64_t>(view.data) + static_cast<int64_t>(view.byte_offset);
}

// An address of 0 is right for a tensor without elements alone: a storage that was resized away has none either.
bool has_memory(const dlpack::Tensor& view) {
  return view.data || std::any_of(view.shape, view.shape + view.dimensions, [](int64_t size) { return size == 0; });
}

// A view whose elements are to be read with the other sign, which DLPack does not tell.
bool is_negated(PyObject* tensor) {
  static PyObject* is_neg = name("is_neg");
  const auto answer = py::reinterpret_steal<py::object>(PyObject_CallMethodNoArgs(tensor, is_neg));
  if (!answer) PyErr_Clear();
  return answer.ptr() == Py_True;
}

// The stride of a dimension of size 1 says nothing about where elements lie.
bool lies_like(const dlpack::Tensor& view, const Layout& expected) {
  const size_t n = expected.shape.size();
  if (size_t(view.dimensions) != n || expected.device != std::pair(view.device.type, view.device.id)) return false;
  for (size_t k = 0; k < n; ++k)
    if (view.shape[k] != expected.shape[k] || (view.strides[k] != expected.strides[k] && view.shape[k] > 1)) return false;
  return true;
}

}  // namespace

Reader::Reader(py::list parameters, py::list states, py::tuple names, int elementwise)
    : p(parameters.size()), g(parameters.size()), p_storage(parameters.size()), g_storage(parameters.size()),
      parameters_(parameters), states_(states), names_(names), expected_(parameters.size()), elementwise_(elementwise),
      plain_(parameters.size()) {
  for (size_t i = 0; i < parameters_.size(); ++i) {
    dlpack::Tensor view;
    if (!look(parameters_[i].ptr(), view)) throw py::value_error("parameter " + std::to_string(i) + " has no strides");
    expected_[i].shape.assign(view.shape, view.shape + view.dimensions);
    expected_[i].strides.assign(view.strides, view.strides + view.dimensions);
    expected_[i].device = {view.device.type, view.device.id};
    p[i] = address_of(view);
    p_storage[i] = g_storage[i] = storage_of(view);
    for (auto key : names_) {
      const auto entry = py::reinterpret_borrow<py::object>(states_[i][key]);
      if (!look(entry.ptr(), view)) throw py::value_error("a state of parameter " + std::to_string(i) + " has no strides");
      entries_.push_back({entry, address_of(view), int32_t(storage_of(view))});
    }
  }
}

void Reader::set_ways(std::vector<int64_t> p_ways, std::vector<int64_t> v_ways, py::list rests) {
  if (p_ways.size() != p.size() || v_ways.size() != p.size() || rests.size() != p.size())
    throw py::value_error("ways and rests need one value per parameter");
  rest_names_ = rests, rests_.assign(p.size(), {});
  for (size_t i = 0; i < p.size(); ++i) {
    p_storage[i] = type_of(p_storage[i]) | p_ways[i] << 2;
    if (state(i, 1)) entries_[i * names_.size() + names_.size() - 1].way = int32_t(v_ways[i]);
    if (rests[i].is_none()) continue;
    const auto rest = py::reinterpret_borrow<py::object>(states_[i][rests[i]]);
    dlpack::Tensor view;
    if (!look(rest.ptr(), view)) throw py::value_error("the rest of parameter " + std::to_string(i) + " has no strides");
    rests_[i] = {rest, address_of(view), int32_t(storage_of(view))};
  }
}

// Whether an entry of a state is the object it was, and lies where it lay.
bool Reader::keeps(const Entry& known, PyObject* state, PyObject* name, bool elementwise) {
  PyObject* entry = PyDict_GetItemWithError(state, name);
  dlpack::Tensor view;
  if (entry != known.tensor.ptr()) return false;
  return !elementwise || (look(entry, view) && address_of(view) == known.address && storage_of(view) == known.storage);
}

bool Reader::keeps_states(size_t i) const {
  const Py_ssize_t names = PyTuple_GET_SIZE(names_.ptr());
  PyObject* state = PyList_GET_ITEM(states_.ptr(), Py_ssize_t(i));
  for (Py_ssize_t k = 0; k < names; ++k)
    if (!keeps(entries_[i * size_t(names) + size_t(k)], state, PyTuple_GET_ITEM(names_.ptr(), k),
               k >= names - elementwise_))
      return false;
  PyObject* rest = rests_.empty() ? Py_None : PyList_GET_ITEM(rest_names_.ptr(), Py_ssize_t(i));
  return rest == Py_None || keeps(rests_[i], state, rest, true);
}

py::tuple Reader::read() {
  static PyObject* grad = name("grad");
  py::list changed, odd;
  bool moved = false;
  int64_t absent = 0, kinds = 0;
  dlpack::Tensor view;
  gradients_.assign(expected_.size(), py::none());
  for (size_t i = 0; i < expected_.size(); ++i) {
    PyObject* parameter = PyList_GET_ITEM(parameters_.ptr(), Py_ssize_t(i));
    const bool kept = look(parameter, view) && storage_of(view) == type_of(p_storage[i]) && lies_like(view, expected_[i]);
    if (!kept || !has_memory(view) || !keeps_states(i)) changed.append(i);
    moved |= p[i] != address_of(view);
    p[i] = address_of(view);
    const auto gradient = py::reinterpret_steal<py::object>(PyObject_GetAttr(parameter, grad));
    if (!gradient) throw py::error_already_set();
    g[i] = 0;
    gradients_[i] = gradient;
    if (gradient.is_none()) {
      ++absent;
    } else if (look(gradient.ptr(), view) && storage_of(view) != NOT_SERVED && lies_like(view, expected_[i]) &&
               has_memory(view) && is_plain(i, gradient.ptr(), address_of(view))) {
      g[i] = address_of(view) ? address_of(view) : -1;  // an empty gradient is there, though it has no memory
      g_storage[i] = storage_of(view);
      kinds |= int64_t(1) << g_storage[i];
    } else {
      odd.append(i);
    }
  }
  return py::make_tuple(changed, odd, moved, absent, kinds);
}

int64_t Reader::workspace_bytes() const {
  int64_t bytes = int64_t(p.size() * 4 * 8 + (entries_.size() + rests_.size()) * sizeof(Entry));
  for (const Layout& one : expected_) bytes += int64_t(sizeof(Layout) + one.shape.size() * 16);
  return bytes;
}

// Asking costs a tenth of a microsecond, so the same object at the same address is asked once.
bool Reader::is_plain(size_t i, PyObject* gradient, int64_t address) {
  const std::pair<PyObject*, int64_t> seen{gradient, address};
  if (plain_[i] == seen) return true;
  if (is_negated(gradient)) return false;
  plain_[i] = seen;
  return true;
}

void Reader::release() { gradients_.clear(); }

void Reader::replace_gradient(size_t index, int64_t address, int64_t storage) {
  g.at(index) = address, g_storage.at(index) = storage;
}

namespace {

int64_t* rows_of(const py::buffer_info& info, size_t size) {
  if (info.itemsize == 8 && size_t(info.size) == size) return static_cast<int64_t*>(info.ptr);
  throw py::value_error("the buffer must hold " + std::to_string(size) + " int64, it holds " + std::to_string(info.size));
}

}  // namespace

const Reader::Entry* Reader::state(size_t i, size_t k) const {
  const size_t names = PyTuple_GET_SIZE(names_.ptr()), first = names - size_t(elementwise_);
  return int(k) < elementwise_ ? &entries_[i * names + first + k] : nullptr;
}

void Reader::addresses(py::buffer rows) const {
  const py::buffer_info info = rows.request(true);
  int64_t* row = rows_of(info, 4 * p.size());
  for (size_t i = 0; i < p.size(); ++i, row += 4) {
    row[0] = p[i], row[1] = g[i];
    for (size_t k = 0; k < 2; ++k) row[2 + k] = state(i, k) ? state(i, k)->address : 0;
  }
}

void Reader::types(py::buffer rows) const {
  const py::buffer_info info = rows.request(true);
  int64_t* row = rows_of(info, p.size());
  for (size_t i = 0; i < p.size(); ++i) {
    row[i] = p_storage[i] | g_storage[i] << 8;
    for (size_t k = 0; k < 2; ++k)
      if (const Entry* one = state(i, k)) row[i] |= int64_t(one->storage | one->way << 2) << (16 + 8 * k);
  }
}

bool same(const py::list& a, const py::list& b) {
  const Py_ssize_t n = PyList_GET_SIZE(a.ptr());
  if (n != PyList_GET_SIZE(b.ptr())) return false;
  for (Py_ssize_t i = 0; i < n; ++i)
    if (PyList_GET_ITEM(a.ptr(), i) != PyList_GET_ITEM(b.ptr(), i)) return false;
  return true;
}

}  // namespace layerfused
