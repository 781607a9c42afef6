// One way in for tensors: addresses, storage types and layouts of parameters and gradients, read anew every step.
//
// Through the DLPack exchange table of the tensor type (torch >= 2.10) a look costs some ten nanoseconds; older
// versions are asked by method calls, with the same result. Neither needs torch's headers.
#pragma once
#include <pybind11/pybind11.h>

#include <cstdint>
#include <string>
#include <vector>

namespace layerfused {

constexpr int64_t NOT_SERVED = -1;  // a storage type that no engine serves

// How a parameter lies in memory, and so how its gradient has to lie; the device is its DLPack type and number.
struct Layout {
  std::vector<int64_t> shape, strides;
  std::pair<int32_t, int32_t> device;
};

class Reader {
 public:
  // `parameters` is a list of tensors, `states` a list of dicts whose entries under `names` belong to the engine. The
  // last `elementwise` names are tensors of their own, which may be given another memory; the others are views.
  Reader(pybind11::list parameters, pybind11::list states, pybind11::tuple names, int elementwise);

  // Reads p and g. Answers what Python has to look at: the indices of parameters that changed their layout or whose
  // states were replaced, those of gradients that do not lie like their parameter, whether an address of p changed,
  // how many parameters have no gradient, and which storage types the others' gradients have, a bit for each.
  pybind11::tuple read();

  // The ways (csrc/storage.h) of each parameter and of its v, and under which name its state holds the parameter's
  // rest, None where there is none.
  void set_ways(std::vector<int64_t> p, std::vector<int64_t> v, pybind11::list rests);

  int64_t workspace_bytes() const;
  void release();  // lets go of the gradients: until then they cannot be freed under the engine
  void replace_gradient(size_t index, int64_t address, int64_t storage);
  void addresses(pybind11::buffer rows) const;  // writes p, g, m, v of each tensor, 0 for a state that is not there
  void types(pybind11::buffer rows) const;      // writes their storage codes, a byte each, into one number a tensor
  std::vector<int64_t> p, g, p_storage, g_storage;

 private:
  bool keeps_states(size_t i) const;  // of the engine's entries in a parameter's state
  bool is_plain(size_t i, PyObject* gradient, int64_t address);

  struct Entry {
    pybind11::object tensor;  // held, so that no other can take its place unseen
    int64_t address;
    int32_t storage, way = 0;
  };
  static bool keeps(const Entry& known, PyObject* state, PyObject* name, bool elementwise);

  const Entry* state(size_t i, size_t k) const;  // m or v; nullptr if the rule has none

  pybind11::list parameters_, states_;
  pybind11::tuple names_;
  std::vector<Layout> expected_;
  int elementwise_;
  std::vector<Entry> entries_;
  pybind11::list rest_names_;
  std::vector<Entry> rests_;  // empty, or as many as parameters
  std::vector<pybind11::object> gradients_;
  std::vector<std::pair<PyObject*, int64_t>> plain_;  // gradients, and their addresses, known not to be negated
};

// Whether two lists hold the same objects.
bool same(const pybind11::list& a, const pybind11::list& b);

}  // namespace layerfused
