#include "stream.h"

#include "ggml-backend.h"
#include "placement.h"
#include "unread_buffer.h"

#include <algorithm>
#include <chrono>
#include <cstring>
#include <map>
#include <string>
#include <utility>

#ifdef __linux__
#    include <sys/mman.h>
#endif

namespace coreinfer {

using Clock = std::chrono::steady_clock;

static double seconds_since(Clock::time_point start) {
    return std::chrono::duration<double>(Clock::now() - start).count();
}

//
// memory
//

WeightStream::WeightStream(const std::vector<Ffn> & ffns, const TensorFiles & files, bool packs) :
    ffns_(ffns),
    files_(files),
    meta_(ggml_init({ ggml_tensor_overhead() * 3 * ffns.size(), nullptr, /*.no_alloc =*/true })) {
    if (!meta_) {
        throw Error(COREINFER_NO_MEMORY, "no memory for the tensors of streamed weights");
    }
    const auto like = [&](const ggml_tensor * dense) {
        return dense ? ggml_new_tensor_2d(meta_.get(), dense->type, dense->ne[0], dense->ne[1]) : nullptr;
    };
    for (const Ffn & ffn : ffns) {
        tensors_.push_back({ like(ffn.up), like(ffn.gate), like(ffn.down) });
    }
    allocate(packs);
    for (size_t i = 0; i < ffns.size(); ++i) {
        first_.push_back(chunks_.size());
        cut_into_chunks(ffns[i].up_file, tensors_[i].up);
        cut_into_chunks(ffns[i].gate_file, tensors_[i].gate);
        cut_into_chunks(ffns[i].down_file, tensors_[i].down);
    }
    first_.push_back(chunks_.size());
    for (const Chunk & chunk : chunks_) {
        slot_size_ = std::max(slot_size_, File::uncached_size(chunk.n_bytes));
    }
    set_ahead(0);
}

WeightStream::~WeightStream() {
    stop();
    unmap_ring();
}

// One buffer of each type that is needed, as large as the FFN that needs most of it.
void WeightStream::allocate(bool packs) {
    using Type = ggml_backend_buffer_type_t;
    std::map<std::pair<ggml_type, int64_t>, Type> types;
    const auto                                    type_of = [&](const ggml_tensor * dense, ggml_backend_dev_t device) {
        if (device) { // it copies them as they are, fast out of memory of its own kind
            const Type pinned = ggml_backend_dev_host_buffer_type(device);
            return pinned ? pinned : ggml_backend_cpu_buffer_type();
        }
        const auto [it, is_new] = types.emplace(std::make_pair(dense->type, dense->ne[0]), nullptr);
        if (is_new) {
            it->second = buffer_type_for(dense, packs);
            if (!takes_rows(it->second, dense->type, dense->ne[0])) {
                it->second = ggml_backend_cpu_buffer_type();
            }
        }
        // not all of a type and width need have a number of rows that a layout takes
        return buffer_type_for(dense, packs) == it->second ? it->second : ggml_backend_cpu_buffer_type();
    };
    struct Place {
        ggml_tensor * tensor;
        Type          type;
        size_t        offset;
    };
    std::vector<Place>     places;
    std::map<Type, size_t> sizes;
    for (size_t i = 0; i < ffns_.size(); ++i) {
        std::map<Type, size_t> used;
        const auto             place = [&](ggml_tensor * tensor, const ggml_tensor * dense) {
            if (tensor) {
                const Type type = type_of(dense, ffns_[i].device);
                size_t &   at   = used[type];
                places.push_back({ tensor, type, at });
                at += GGML_PAD(ggml_backend_buft_get_alloc_size(type, tensor), ggml_backend_buft_get_alignment(type));
                sizes[type] = std::max(sizes[type], at);
            }
        };
        place(tensors_[i].up, ffns_[i].up);
        place(tensors_[i].gate, ffns_[i].gate);
        place(tensors_[i].down, ffns_[i].down);
    }
    std::map<Type, ggml_backend_buffer_t> made;
    for (const auto & [type, size] : sizes) {
        ggml_backend_buffer_t buffer = ggml_backend_buft_alloc_buffer(type, size);
        if (!buffer) {
            throw Error(COREINFER_NO_MEMORY, "no memory for the weights of one layer");
        }
        // so that the scheduler lets a device have large products with them
        ggml_backend_buffer_set_usage(buffer, GGML_BACKEND_BUFFER_USAGE_WEIGHTS);
        buffers_.emplace_back(buffer);
        made[type] = buffer;
    }
    for (const Place & place : places) {
        ggml_backend_buffer_t buffer = made[place.type];
        ggml_backend_tensor_alloc(buffer, place.tensor,
                                  static_cast<uint8_t *>(ggml_backend_buffer_get_base(buffer)) + place.offset);
    }
}

void WeightStream::cut_into_chunks(const FileTensor & file, const ggml_tensor * tensor) {
    if (!tensor) {
        return;
    }
    const int64_t row_size     = static_cast<int64_t>(tensor->nb[1]);
    const int64_t groups       = static_cast<int64_t>(kChunk) / (row_size * kRowGroup);
    const int64_t rows_a_chunk = std::max<int64_t>(1, groups) * kRowGroup;
    for (int64_t first = 0; first < tensor->ne[1]; first += rows_a_chunk) {
        const int64_t n = std::min(rows_a_chunk, tensor->ne[1] - first);
        chunks_.push_back({ rows_of(tensor, first, n), file.file, file.offset + static_cast<uint64_t>(first * row_size),
                            static_cast<size_t>(n * row_size) });
    }
}

void WeightStream::map_ring(size_t n_bytes) {
    ring_size_ = n_bytes;
#ifdef __linux__
    void * memory = mmap(nullptr, n_bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED) {
        throw Error(COREINFER_NO_MEMORY, "no memory to read weights ahead");
    }
    ring_ = static_cast<uint8_t *>(memory);
#endif
}

void WeightStream::unmap_ring() {
#ifdef __linux__
    if (ring_) {
        munmap(ring_, ring_size_);
    }
#endif
    ring_ = nullptr;
}

void WeightStream::set_ahead(size_t n_bytes) {
    stop();
    unmap_ring();
    const size_t n = std::min(chunks_.size(), std::max(kLeastChunks, n_bytes / slot_size_));
    map_ring(n * slot_size_);
    slots_.assign(n, {});
    for (size_t i = 0; i < n; ++i) {
        slots_[i].memory = ring_ + i * slot_size_;
    }
}

//
// reading
//

void WeightStream::begin(int32_t n_passes) {
    const std::lock_guard<std::mutex> lock(mutex_);
    figures_ = {};
    error_.reset();
    failed_ = false;
    restart(0, static_cast<uint64_t>(std::max(1, n_passes)));
}

// Expect this FFN next, as part of so many evaluations. The mutex is held.
void WeightStream::restart(size_t ffn, uint64_t n_passes) {
    for (Slot & slot : slots_) {
        slot.data = nullptr;
    }
    ++restarts_;
    ffn_     = ffn;
    entered_ = left_ = 0;
    base_            = end_;
    next_            = base_ + first_[ffn];
    end_             = base_ + n_passes * chunks_.size();
    if (!reader_.joinable()) {
        reader_ = std::thread([this] { read_ahead(); });
    }
    wanted_.notify_one();
}

void WeightStream::read_ahead() {
    std::unique_lock<std::mutex> lock(mutex_);
    while (true) {
        wanted_.wait(lock, [&] { return stopping_ || (!failed_ && next_ < end_ && !slot(next_).data); });
        if (stopping_) {
            return;
        }
        const uint64_t turn     = next_++;
        const uint64_t restarts = restarts_;
        const Chunk &  chunk    = chunks_[turn % chunks_.size()];
        uint8_t *      memory   = slot(turn).memory;
        const bool     is_first = turn % chunks_.size() == 0;
        lock.unlock();

        const uint8_t *      data   = nullptr;
        bool                 failed = false;
        std::optional<Error> error;
        const auto           start = Clock::now();
        try {
            if (is_first) {
                files_.check_unchanged();
            }
            data = chunk.file->read_uncached(memory, chunk.n_bytes, chunk.offset);
        } catch (const Error & caught) {
            failed = true;
            error  = caught;
        } catch (const std::exception &) {
            failed = true;
        }
        const double seconds = seconds_since(start);

        lock.lock();
        if (restarts != restarts_ || turn < skipped_) {
            continue; // nobody waits for it any more
        }
        if (failed) {
            fail(error);
            continue;
        }
        figures_.n_bytes += chunk.n_bytes;
        figures_.read_seconds += seconds;
        slot(turn).turn = turn;
        slot(turn).data = data;
        filled_.notify_all();
    }
}

void WeightStream::fail(const std::optional<Error> & error) noexcept {
    error_  = error;
    failed_ = true;
    filled_.notify_all();
}

//
// computing
//

void WeightStream::load(size_t ffn, int nth_part, int n_parts) {
    enter(ffn);
    for (size_t i = first_[ffn] + nth_part; i < first_[ffn + 1]; i += n_parts) {
        const uint64_t  turn = base_ + i; // stays as it is while a thread is in here
        const uint8_t * data = wait(turn, nth_part == 0);
        if (!data) {
            break;
        }
        ggml_tensor rows = chunks_[i].rows;
        ggml_backend_tensor_set(&rows, data, 0, chunks_[i].n_bytes);
        release(turn);
    }
    leave(ffn, n_parts);
}

// The first thread at an FFN sees whether it is the one whose weights are coming.
void WeightStream::enter(size_t ffn) {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (entered_++ > 0 || failed_) {
        return;
    }
    try {
        if (ffn != ffn_) {
            skip_to(ffn);
        }
        if (!reader_.joinable() || ffn != ffn_) {
            restart(ffn, 1);
            entered_ = 1;
        } else if (end_ <= base_) {
            end_ = base_ + chunks_.size(); // one more than was announced
            wanted_.notify_one();
        }
    } catch (const std::exception &) {
        fail(std::nullopt);
    }
}

// The graph leaves out nodes without tokens: the last FFN, where none of a batch has its logits asked for. Go on
// with a later one of those announced. The mutex is held.
void WeightStream::skip_to(size_t ffn) {
    const uint64_t base = ffn < ffn_ ? base_ + chunks_.size() : base_;
    const uint64_t turn = base + first_[ffn];
    if (turn >= end_) {
        return;
    }
    base_    = base;
    ffn_     = ffn;
    skipped_ = turn;
    next_    = std::max(next_, turn);
    for (Slot & slot : slots_) {
        if (slot.data && slot.turn < turn) {
            slot.data = nullptr;
        }
    }
    wanted_.notify_one();
}

void WeightStream::leave(size_t ffn, int n_parts) {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (++left_ < n_parts) {
        return;
    }
    entered_ = left_ = 0;
    ffn_             = ffn + 1;
    if (ffn_ == ffns_.size()) {
        ffn_ = 0;
        base_ += chunks_.size();
    }
}

const uint8_t * WeightStream::wait(uint64_t turn, bool count) {
    std::unique_lock<std::mutex> lock(mutex_);
    const auto                   start = Clock::now();
    filled_.wait(lock, [&] { return failed_ || (slot(turn).data && slot(turn).turn == turn); });
    if (count) {
        figures_.waited_seconds += seconds_since(start);
    }
    return failed_ ? nullptr : slot(turn).data;
}

void WeightStream::release(uint64_t turn) {
    const std::lock_guard<std::mutex> lock(mutex_);
    slot(turn).data = nullptr;
    wanted_.notify_one();
}

void WeightStream::stop() {
    {
        const std::lock_guard<std::mutex> lock(mutex_);
        stopping_ = true;
        wanted_.notify_one();
    }
    if (reader_.joinable()) {
        reader_.join();
    }
    const std::lock_guard<std::mutex> lock(mutex_);
    stopping_ = false;
    for (Slot & slot : slots_) {
        slot.data = nullptr;
    }
    base_ = next_ = end_;
    ffn_          = 0;
    entered_ = left_ = 0;
}

void WeightStream::end() {
    stop();
    give_back(ring_, ring_size_);
    for (const ggml_backend_buffer_ptr & buffer : buffers_) {
        ggml_backend_dev_t device = ggml_backend_buft_get_device(ggml_backend_buffer_get_type(buffer.get()));
        if (device && ggml_backend_dev_type(device) != GGML_BACKEND_DEVICE_TYPE_CPU) {
            continue; // a driver has pinned it
        }
        give_back(ggml_backend_buffer_get_base(buffer.get()), ggml_backend_buffer_get_size(buffer.get()));
    }
    std::optional<Error> error = std::move(error_);
    if (failed_ && !error) {
        error.emplace(COREINFER_NO_MEMORY, "no memory, or no thread, to read weights with");
    }
    error_.reset();
    failed_ = false;
    if (error) {
        throw *error;
    }
}

WeightStream::Figures WeightStream::figures() const {
    const std::lock_guard<std::mutex> lock(mutex_);
    return figures_;
}

} // namespace coreinfer
