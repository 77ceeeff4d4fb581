#pragma once

// Chooses the buffers for weights, and knows how buffers lay weights out.

#include "core_set.h"
#include "ffn.h"
#include "ggml-backend.h"
#include "ggml-cpp.h"

#include <cstdint>
#include <map>
#include <vector>

namespace coreinfer {

// The fastest buffers of the CPU for a tensor like this one of the model. packs: they may be packed.
ggml_backend_buffer_type_t buffer_type_for(const ggml_tensor * dense, bool packs);

// Whether a device multiplies with weights of this type and shape.
bool runs_on(ggml_backend_dev_t device, ggml_type type, int64_t n_in, int64_t n_out);

// Buffer types interleave rows in groups of 4, 8 or 16. A group of 32 rows is thus independent of all other rows.
constexpr int64_t kRowGroup = 32;

// The n rows of a tensor from first on, as a tensor that shares its data. first is a multiple of kRowGroup, and so is n
// unless these are the last rows.
ggml_tensor rows_of(const ggml_tensor * tensor, int64_t first, int64_t n);

// Whether a buffer type lays out a group of kRowGroup rows independently of the other rows.
bool takes_rows(ggml_backend_buffer_type_t type, ggml_type weights, int64_t n_in);

// Makes the tensors of a core set, with a context and a buffer for each buffer type. allocate() moves these to the
// core, which then owns the tensors. They go to the device that computes the layer, wherever the dense FFN lies.
class Placement {
  public:
    Placement(const Ffn & ffn, bool packs);

    ggml_tensor * matrix(ggml_type type, int64_t n_in, int64_t n_out, const char * name);
    ggml_tensor * mixed(ggml_type type, int64_t n_in, int64_t n_out, const Mixed & parts, const char * name);
    ggml_tensor * vector(int64_t n, const char * name);
    void          allocate(Core & core);

  private:
    ggml_context * context(ggml_backend_buffer_type_t type);

    std::vector<ggml_backend_buffer_type_t>                candidates_;
    ggml_backend_buffer_type_t                             vectors_;
    bool                                                   packs_;
    std::map<ggml_backend_buffer_type_t, ggml_context_ptr> contexts_;
};

} // namespace coreinfer
