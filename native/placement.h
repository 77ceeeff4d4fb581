#pragma once

// Which buffers weights are placed in, and how those lay them out.

#include "core_set.h"
#include "ffn.h"
#include "ggml-backend.h"
#include "ggml-cpp.h"

#include <cstdint>
#include <map>
#include <vector>

namespace coreinfer {

// Whether the CPU computes with what is in such buffers: a device's own host buffers are among them.
bool is_on_cpu(ggml_backend_buffer_type_t type);

// The fastest buffers for weights of this shape that take the place of the model's.
ggml_backend_buffer_type_t buffer_type_for(const ggml_tensor * dense, ggml_type type, int64_t n_in, int64_t n_out);

// Layouts of buffer types interleave rows in groups of 4, 8 or 16: so many can be laid out apart from others.
constexpr int64_t kRowGroup = 32;

// Rows of a tensor as one of their own: n from first on, both multiples of kRowGroup (or up to the last).
ggml_tensor rows_of(const ggml_tensor * tensor, int64_t first, int64_t n);

// Whether a buffer type lays out a group of rows the same whether others come with it or not.
bool takes_rows(ggml_backend_buffer_type_t type, ggml_type weights, int64_t n_in);

// Whether packed weights are of use: not where some layers are on a device, and the activations between products that
// the CPU alone computes would go there and back.
bool may_pack(const std::vector<Ffn> & ffns);

// Makes the tensors of a core, a context and a buffer for each buffer type.
class Placement {
  public:
    Placement(const Ffn & ffn, bool packs);

    ggml_tensor * matrix(ggml_type type, int64_t n_in, int64_t n_out, const char * name);
    ggml_tensor * vector(int64_t n, const char * name);
    void          allocate(Core & core);

  private:
    ggml_context * context(ggml_backend_buffer_type_t type);

    std::vector<ggml_backend_buffer_type_t>                candidates_;
    bool                                                   packs_;
    std::map<ggml_backend_buffer_type_t, ggml_context_ptr> contexts_;
};

} // namespace coreinfer
