#pragma once

// Evaluates FFNs whose weights are in no memory: a thread reads them in the order of the graph, ahead of their
// use, into a ring of chunks, and a node before each FFN lays them out where its products find them.

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
    // ffns are all that are streamed, in the order of the graph. Both must live as long as this.
    WeightStream(const std::vector<Ffn> & ffns, const TensorFiles & files);
    ~WeightStream();
    WeightStream(const WeightStream &)             = delete;
    WeightStream & operator=(const WeightStream &) = delete;

    // The tensors that stand for an FFN's in the graph; all FFNs share their memory.
    struct Tensors {
        ggml_tensor * up   = nullptr;
        ggml_tensor * gate = nullptr;
        ggml_tensor * down = nullptr;
    };

    const Tensors & tensors(size_t ffn) const { return tensors_[ffn]; }

    // How many bytes may be read ahead; at least a few chunks. Ends what is being read.
    void set_ahead(size_t n_bytes);

    // Start to read for so many evaluations of the graph. Throws Error if there is no memory.
    void begin(int32_t n_passes);

    // For a node before the FFN: returns once its part, of nth, of the weights is in place. After a failure it
    // returns at once.
    void load(size_t ffn, int nth_part, int n_parts);

    // Whether reading has failed, so that what is being evaluated is worth nothing.
    bool failed() const { return failed_; }

    // Stop reading and give the memory back to the system. Throws why reading has failed, if it has.
    void end();

    // Since begin().
    struct Figures {
        uint64_t n_bytes        = 0;
        double   read_seconds   = 0.0; // the reading thread in reads
        double   waited_seconds = 0.0; // the first computing thread in waiting for it
    };

    Figures figures() const;

  private:
    // Some rows of a weight.
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
        uint64_t        turn   = 0;       // which chunk is in it, counted over all evaluations
    };

    void allocate();
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
    void            fail(const Error & error);
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
