#pragma once

// Streams the weights of FFNs that stay in the file. A thread reads them in the order of the graph, ahead of their use,
// into a ring of chunks. A node before each FFN copies its chunks into tensors that the products use.

#include "error.h"
#include "ffn.h"
#include "ggml-cpp.h"

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <memory>
#include <mutex>
#include <optional>
#include <thread>
#include <vector>

namespace coreinfer {

class WeightStream {
  public:
    static constexpr size_t kChunk       = 2 << 20; // bytes that are read at a time, about
    static constexpr size_t kLeastChunks = 4;       // fewer would not keep reading and laying out apart

    // ffns are all streamed FFNs, in the order of the graph. The caller owns ffns and files, and keeps them for as long
    // as this object.
    WeightStream(const std::vector<Ffn> & ffns, const TensorFiles & files, bool packs);
    ~WeightStream();
    WeightStream(const WeightStream &)             = delete;
    WeightStream & operator=(const WeightStream &) = delete;

    // The tensors that replace those of an FFN in the graph. All FFNs share their memory.
    struct Tensors {
        ggml_tensor * up   = nullptr;
        ggml_tensor * gate = nullptr;
        ggml_tensor * down = nullptr;
    };

    const Tensors & tensors(size_t ffn) const { return tensors_[ffn]; }

    // Sets how many bytes are read ahead, kLeastChunks at least. Stops reading.
    void set_ahead(size_t n_bytes);

    // Starts to read for the next n_passes evaluations of the graph. Throws Error if there is no memory.
    void begin(int32_t n_passes);

    // A node before the FFN calls this from each of n_parts threads. It returns when the chunks of this thread are in
    // place. After a failure it returns at once.
    void load(size_t ffn, int nth_part, int n_parts);

    // Whether reading has failed. The result of the evaluation is then wrong.
    bool failed() const { return failed_; }

    // Stops reading, and returns the memory to the system. If reading has failed, throws the reason.
    void end();

    // What has been read since begin().
    struct Figures {
        uint64_t n_bytes        = 0;
        double   read_seconds   = 0.0; // time of the reading thread in reads
        double   waited_seconds = 0.0; // time that the first computing thread waited
    };

    Figures figures() const;

  private:
    // Some rows of a tensor, read at once.
    struct Chunk {
        ggml_tensor  rows; // of the tensor in the graph
        const File * file;
        uint64_t     offset;
        size_t       n_bytes;
    };

    // Memory that a chunk is read into.
    struct Slot {
        uint8_t *       memory = nullptr;
        const uint8_t * data   = nullptr; // nullptr: free
        uint64_t        turn   = 0;       // number of its chunk, counted over all evaluations
    };

    void allocate(bool packs);
    void cut_into_chunks(const FileTensor & file, const ggml_tensor * tensor);
    void map_ring(size_t n_bytes);
    void unmap_ring();

    Slot & slot(uint64_t turn) { return slots_[turn % slots_.size()]; }

    void            restart(size_t ffn, uint64_t n_passes);
    void            read_ahead();
    void            enter(size_t ffn);
    void            skip_to(size_t ffn);
    void            leave(size_t ffn, int n_parts);
    const uint8_t * wait(uint64_t turn, bool count);
    void            release(uint64_t turn);
    void            fail(const std::optional<Error> & error) noexcept; // empty: there was no memory to say why
    void            stop();

    const std::vector<Ffn> & ffns_;
    const TensorFiles &      files_;

    // what never changes
    ggml_context_ptr                     meta_;
    std::vector<ggml_backend_buffer_ptr> buffers_;
    std::vector<Tensors>                 tensors_;
    std::vector<Chunk>                   chunks_; // of one evaluation
    std::vector<size_t>                  first_;  // chunk of each FFN, and their number
    size_t                               slot_size_ = 0;

    uint8_t *         ring_      = nullptr;
    size_t            ring_size_ = 0;
    std::vector<Slot> slots_;

    mutable std::mutex      mutex_; // guards all that follows
    std::condition_variable wanted_;
    std::condition_variable filled_;
    std::thread             reader_;
    bool                    stopping_ = false;
    uint64_t                base_     = 0; // turn of the first chunk of this evaluation, or the next
    uint64_t                next_     = 0; // turn to be read next
    uint64_t                end_      = 0; // turn not to be read any more
    uint64_t                skipped_  = 0; // turns before this are not waited for
    uint64_t                restarts_ = 0;
    size_t                  ffn_      = 0; // FFN that is expected next
    int                     entered_  = 0; // computing threads that are at it
    int                     left_     = 0;
    std::optional<Error>    error_;
    std::atomic<bool>       failed_ = false;
    Figures                 figures_;
};

} // namespace coreinfer
