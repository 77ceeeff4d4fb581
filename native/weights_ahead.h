#pragma once

// Copies weights from main memory to a device: the next ones are on their way while the device computes with these.

#include "ggml-backend.h"
#include "ggml-cpp.h"
#include "ggml.h"

#include <cstddef>
#include <map>
#include <memory>
#include <unordered_set>

namespace coreinfer {

class WeightsAhead {
  public:
    // So much of the next weights crosses the bus during a product, at most, and takes memory of the device. It is what
    // a bus of 55 GB/s moves while an H100 multiplies 256 tokens; larger batches would have time for more.
    static constexpr size_t kAhead = 16u << 20;

    // The weights to copy. They must stay where they are, and unchanged, until the last copy is done.
    explicit WeightsAhead(std::unordered_set<const ggml_tensor *> weights, size_t n_ahead);

    ~WeightsAhead();

    // As ggml_backend_sched_copy_callback.
    bool copy(ggml_backend_t backend, const ggml_tensor * weights, ggml_tensor * dst, const ggml_tensor * next);

  private:
    // A second queue of a device, and memory there for the beginning of the next weights.
    struct Lane {
        ggml_backend_ptr        queue;
        ggml_context_ptr        ctx;
        ggml_backend_buffer_ptr buffer;
        ggml_tensor *           begun = nullptr; // [n_ahead_] bytes
        ggml_backend_event_ptr  arrived;         // begun is filled
        ggml_backend_event_ptr  taken;           // begun may be written over
        const ggml_tensor *     of = nullptr;    // whose beginning it is
    };

    std::unordered_set<const ggml_tensor *>         weights_;
    size_t                                          n_ahead_ = 0; // no more than the largest of them has
    std::map<ggml_backend_t, std::unique_ptr<Lane>> lanes_;       // nullptr: the device cannot

    std::unique_ptr<Lane> make_lane(ggml_backend_dev_t device) const;
};

} // namespace coreinfer
