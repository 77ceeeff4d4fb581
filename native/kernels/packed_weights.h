#pragma once

// A buffer type for quantised weights in the order of our own kernels (packed_product.h). These are faster than ggml's
// on x86 processors: ggml's use half of the lanes, and go row by row for Q4_1 and Q5. The CPU backend multiplies with
// packed weights through ggml-cpu-layout.h, as with its own layouts.

#include "ggml-backend.h"
#include "kernels/packed_product.h"

#include <vector>

namespace coreinfer {

// What the environment variable COREINFER_KERNELS may name, separated by spaces. "none" leaves all to ggml.
constexpr char kKernelNames[] = "avx512 avx2 none";

// The kernels that this processor has the instructions for, the fastest first.
std::vector<const PackedKernels *> packed_kernels();

// nullptr if this processor can run none of the kernels. The first call makes the type known to ggml.
ggml_backend_buffer_type_t packed_buffer_type();

// Whether weights of this type and shape are faster packed than in any layout of ggml's.
bool is_packable(ggml_type type, int64_t n_in, int64_t n_out);

bool is_packed(const ggml_tensor * tensor);

// Whether llama.cpp places what is packable into packed buffers, in models that this thread loads from now on.
void load_packed(bool on);

// What the kernels subtract from a stored level of this type before they multiply it with its scale.
int32_t level_offset(const PackedKernels & kernels, ggml_type type);

// Pack n_rows rows of weights, a multiple of kLanes, that are stored as ggml stores them.
void pack_rows(const PackedKernels & kernels, ggml_type type, const uint8_t * rows, int64_t n_rows, int64_t n_in,
               uint8_t * packed);

} // namespace coreinfer
