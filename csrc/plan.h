// The schedule as plain data: what layerfused/plan.py makes and every engine runs. All fields are int64, so that a
// flat array of integers is the whole exchange format.
#pragma once
#include <cstdint>

namespace layerfused {

// A contiguous range of one tensor that belongs to one layer; its index is also the slot of its partial sums. It stands
// for `elements` of the layer: for more than its own where the rest lies on other ranks.
struct Chunk {
  int64_t tensor, start, count, layer, elements;
};

// A run of chunks. `state` is the first of the `states` slots that keep the layer's float64 state (one per tensor).
struct Layer {
  int64_t group, first, chunks, elements, adapt, state, states;
};

enum class Kind : int64_t {
  norm,    // a chunk's share of the global gradient norm
  reduce,  // a chunk's share of its layer's stats; the last to arrive combines them and finishes the layer
  apply,   // the update of a chunk of that layer, once it is finished (on the CPU a worker takes one that lies in its
           // own cache). Of a layer without stats: of this very chunk, moments and update at once
  whole,   // a layer small enough for one worker: reduce, finish and apply
};

// `index` is a layer for `whole`, else a chunk. An item waits only for items before it in the list.
struct Item {
  Kind kind;
  int64_t index;
};

// PREDICT: predicted weights from true ones and states, of the last step; with UNCOUNTED of the step under way.
enum Phase : unsigned { NORM = 1, REDUCE = 2, FINISH = 4, APPLY = 8, STEP = 15, PREDICT = 16, UNCOUNTED = 32 };

}  // namespace layerfused
