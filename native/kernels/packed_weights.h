#pragma once

// A buffer type for quantised weights in the order of our own kernels (packed_product.h). These are faster than ggml's
// on x86 processors: ggml's use half of the lanes, and go row by row for Q4_1 and Q5. On ARM they take fewer
// instructions (docs/benchmarks.md). The CPU backend multiplies with
// packed weights through ggml-cpu-layout.h, as with its own layouts.

#include "ggml-backend.h"
#include "kernels/packed_layout.h"

#include <vector>

namespace coreinfer {

// nullptr if this processor can run none of the kernels. The first call makes the type known to ggml.
ggml_backend_buffer_type_t packed_buffer_type();

// The buffer types that the CPU has for weights beside plain memory, the fastest first; ours is among them once it is
// known to ggml.
std::vector<ggml_backend_buffer_type_t> cpu_layouts();

// Whether weights of this type and shape are faster packed than in any layout of ggml's.
bool is_packable(ggml_type type, int64_t n_in, int64_t n_out);

bool is_packed(const ggml_tensor * tensor);

// A matrix whose parts are of several types. Each part lies packed behind the one before.
struct Mixed {
    // A range of the columns of a range of the rows.
    struct Part {
        ggml_type type; // one with has_layout(), or is_low()
        int64_t   first_in;
        int64_t   n_in;
        int64_t   first_group; // of kLanes rows
        int64_t   n_groups;
        size_t    offset = 0; // where it begins, in bytes; set by add()
    };

    std::vector<Part> parts; // of the same rows by columns in order
    size_t            n_bytes = 0;

    void add(Part part);
};

// Whether a mixed matrix can have weights of this type beside those of the formats of our own.
bool is_mixable(ggml_type type, int64_t n_in, int64_t n_out);

// The type that full weights of this type have in a mixed matrix: their own, or Q8_0 for halves, which have no kernel.
ggml_type mixed_type(ggml_type type);

// The type of full columns that are gathered from a down of this type. What would have four bits again gets them in our
// own format, which holds columns with half of the error.
ggml_type mixed_column_type(ggml_type type);

// Makes tensor, which has no data yet, the mixed matrix. It is of the type that level_offset() is asked for; the
// parts in other types are in formats of our own. The caller keeps mixed as long as the tensor.
void make_mixed(ggml_tensor * tensor, const Mixed & mixed);

// Packs kLanes rows of one part of a mixed tensor: as ggml stores them, or as quantize_low_row() makes them.
void set_mixed(ggml_tensor * tensor, const Mixed::Part & part, int64_t group, const uint8_t * rows);

// Whether llama.cpp places what is packable into packed buffers, in models that this thread loads from now on. tied: so
// does it an embedding, which is the output too.
void load_packed(bool on, bool tied);

} // namespace coreinfer
