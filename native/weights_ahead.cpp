#include "weights_ahead.h"

#include <algorithm>
#include <cstdint>
#include <utility>

namespace coreinfer {

WeightsAhead::WeightsAhead(std::unordered_set<const ggml_tensor *> weights, size_t n_ahead) :
    weights_(std::move(weights)) {
    for (const ggml_tensor * of : weights_) {
        n_ahead_ = std::max(n_ahead_, std::min(n_ahead, ggml_nbytes(of)));
    }
}

WeightsAhead::~WeightsAhead() {
    for (auto & [backend, lane] : lanes_) {
        if (lane) {
            ggml_backend_synchronize(lane->queue.get());
        }
    }
}

std::unique_ptr<WeightsAhead::Lane> WeightsAhead::make_lane(ggml_backend_dev_t device) const {
    ggml_backend_dev_props props = {};
    ggml_backend_dev_get_props(device, &props);
    if (!props.caps.async || !props.caps.events) {
        return nullptr;
    }
    auto lane = std::make_unique<Lane>();
    lane->queue.reset(ggml_backend_dev_init(device, nullptr));
    lane->ctx.reset(ggml_init({ ggml_tensor_overhead(), nullptr, /*.no_alloc =*/true }));
    lane->arrived.reset(ggml_backend_event_new(device));
    lane->taken.reset(ggml_backend_event_new(device));
    if (!lane->queue || !lane->ctx || !lane->arrived || !lane->taken) {
        return nullptr;
    }
    lane->begun = ggml_new_tensor_1d(lane->ctx.get(), GGML_TYPE_I8, n_ahead_);
    lane->buffer.reset(ggml_backend_alloc_ctx_tensors_from_buft(lane->ctx.get(), ggml_backend_dev_buffer_type(device)));
    return lane->buffer ? std::move(lane) : nullptr;
}

// As if it were n bytes at this address.
static ggml_tensor bytes_at(const ggml_tensor * like, ggml_backend_buffer_t buffer, void * data, size_t n) {
    ggml_tensor bytes = *like;
    bytes.buffer      = buffer;
    bytes.data        = data;
    bytes.ne[0]       = static_cast<int64_t>(n);
    bytes.nb[1] = bytes.nb[2] = bytes.nb[3] = n;
    return bytes;
}

bool WeightsAhead::copy(ggml_backend_t backend, const ggml_tensor * weights, ggml_tensor * dst,
                        const ggml_tensor * next) {
    if (weights_.count(weights) == 0) {
        return false;
    }
    const auto [found, is_new] = lanes_.emplace(backend, nullptr);
    if (is_new) {
        found->second = make_lane(ggml_backend_get_device(backend));
    }
    Lane * lane = found->second.get();
    if (!lane) {
        return false;
    }
    // in the backend's own queue: behind what may still read the memory of dst, before the product
    const size_t size  = ggml_nbytes(weights);
    const size_t begun = lane->of == weights ? std::min(size, n_ahead_) : 0;
    if (begun < size) {
        ggml_backend_tensor_set_async(backend, dst, static_cast<const uint8_t *>(weights->data) + begun, begun,
                                      size - begun);
    }
    if (begun > 0) {
        ggml_backend_event_wait(backend, lane->arrived.get());
        const ggml_tensor from = bytes_at(lane->begun, lane->buffer.get(), lane->begun->data, begun);
        ggml_tensor       to   = bytes_at(lane->begun, dst->buffer, dst->data, begun);
        ggml_backend_tensor_copy_async(backend, backend, &from, &to);
    }
    lane->of = nullptr;
    if (next && weights_.count(next) > 0) {
        ggml_backend_event_record(lane->taken.get(), backend);
        ggml_backend_event_wait(lane->queue.get(), lane->taken.get());
        ggml_backend_tensor_set_async(lane->queue.get(), lane->begun, next->data, 0,
                                      std::min(ggml_nbytes(next), n_ahead_));
        ggml_backend_event_record(lane->arrived.get(), lane->queue.get());
        lane->of = next;
    }
    return true;
}

} // namespace coreinfer
