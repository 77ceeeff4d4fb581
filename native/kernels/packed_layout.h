#pragma once

// The order of packed weights, and the kernels (packed_product.h) that this processor can run.

#include "kernels/packed_product.h"

#include <vector>

namespace coreinfer {

// What the environment variable COREINFER_KERNELS may name, separated by spaces. "none" leaves all to ggml.
constexpr char kKernelNames[] = "avx512vnni avx512 avxvnni avx2 i8mm dotprod neon none";

// The kernels that this processor has the instructions for, the fastest first.
std::vector<const PackedKernels *> packed_kernels();

// The fastest, or those that COREINFER_KERNELS names; nullptr if there are none.
const PackedKernels * chosen_kernels();

// Whether there are kernels for weights of this type.
bool has_layout(ggml_type type);

// What the kernels subtract from a stored level of this type before they multiply it with its scale.
int32_t level_offset(const PackedKernels & kernels, ggml_type type);

// Quantised activations in a caller's memory of size() bytes, aligned to 4.
class QuantizedTokens {
  public:
    QuantizedTokens(void * memory, int64_t n_tokens, int64_t n_in);

    static size_t size(int64_t n_tokens, int64_t n_in); // whole cache lines

    // x: [n_in] of one token, for weights of this type.
    void quantize(const PackedKernels & kernels, ggml_type type, int64_t token, const float * x) const;

    // The n activations of each token from one on, a multiple of 32.
    QuantizedInput input(int64_t first, int64_t n) const;

    QuantizedInput input() const { return input(0, n_in_); }

  private:
    QuantizedBlocks blocks_;
    int64_t         n_tokens_;
    int64_t         n_in_;
};

// Pack n_rows rows of weights, a multiple of kLanes, that are stored as ggml stores them.
void pack_rows(const PackedKernels & kernels, ggml_type type, const uint8_t * rows, int64_t n_rows, int64_t n_in,
               uint8_t * packed);

// The n_in values of a row, as ggml computes them. packed: all rows, of a type with has_layout().
void unpack_row(const PackedKernels & kernels, ggml_type type, const uint8_t * packed, int64_t row, int64_t n_in,
                float * values);

} // namespace coreinfer
