#pragma once

// A buffer type for quantised weights in the order of our own kernels (packed_product.h). These are faster than ggml's
// on x86 processors: ggml's use half of the lanes, and go row by row for Q4_1 and Q5. The CPU backend multiplies with
// packed weights through ggml-cpu-layout.h, as with its own layouts.

#include "ggml-backend.h"
#include "kernels/packed_layout.h"

namespace coreinfer {

// nullptr if this processor can run none of the kernels. The first call makes the type known to ggml.
ggml_backend_buffer_type_t packed_buffer_type();

// Whether weights of this type and shape are faster packed than in any layout of ggml's.
bool is_packable(ggml_type type, int64_t n_in, int64_t n_out);

bool is_packed(const ggml_tensor * tensor);

// Whether llama.cpp places what is packable into packed buffers, in models that this thread loads from now on.
void load_packed(bool on);

} // namespace coreinfer
