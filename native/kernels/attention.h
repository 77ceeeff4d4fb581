#pragma once

// Attention over a cache of keys and values in half precision, in chunks of positions. Each chunk gives a part of the
// softmax and its sum; parts are merged in order.

#include "ggml.h"

#include <cstddef>
#include <cstdint>

struct ggml_cpu_layout_thread;

namespace coreinfer {

namespace attention {

// Positions of a chunk.
constexpr int64_t kChunk = 64;

// The most rows that go through a chunk together, so that it is converted once for all.
constexpr int64_t kRows = 64;

// Of so many rows the keys are worth being put in columns, which rounds differently.
constexpr int64_t kManyRows = 16;

// A multiple of which the widths of keys and values are.
constexpr int64_t kWidth = 16;

// One head of keys and values, and the heads of queries that share it, for all tokens.
struct Head {
    const uint8_t * keys; // of position 0, in half precision
    size_t          key_step;
    const uint8_t * values;
    size_t          value_step;
    const uint8_t * queries; // of token 0 and the first head, in single precision
    size_t          query_step;
    size_t          query_head_step;
    const uint8_t * mask; // of token 0, in half precision, added to what keys and queries give; can be nullptr
    size_t          mask_step;
    int64_t         n_shared;
    int64_t         n_positions;
    int64_t         n_key; // width
    int64_t         n_value;
    float           scale;
};

// The floats of what a row, which is a query of a token, has of some positions: the largest exponent, the sum of the
// exponentials of all less that, and from kWidth on the sum of the values times these.
inline int64_t part_size(int64_t n_value) {
    return kWidth + n_value; // the values are aligned
}

// Floats of a thread's memory for head.
inline int64_t scratch_size(int64_t n_key, int64_t n_value) {
    return kChunk * (n_key + n_value + kRows);
}

// Of rows first to first + n - 1, kRows at most, row i being query i % n_shared of token i / n_shared: the part of a
// chunk, merged into what parts has.
using Attend = void (*)(const Head & head, int64_t chunk, int64_t first, int64_t n, float * scratch, float * parts);

// A part of no positions.
void clear(float * part, int64_t n_value);

// Adds the positions of one part to those of another.
void merge(float * part, const float * other, int64_t n_value);

// The values of the row: the sum over what they were weighted with; zeros if that is none.
void finish(const float * part, int64_t n_value, float * out);

// Whether node, a GGML_OP_FLASH_ATTN_EXT, is one that this can compute.
bool is_supported(const ggml_tensor * node);

size_t work_size(int n_threads, const ggml_tensor * node);

// Computes the node together with other threads. wait returns once all of them have called it.
void compute(Attend attend, const ggml_cpu_layout_thread & thread, void (*wait)(const ggml_cpu_layout_thread *),
             ggml_tensor * node);

} // namespace attention

} // namespace coreinfer
