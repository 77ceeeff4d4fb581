#pragma once

// Reads the tensors of GGUF files with plain reads, so that a file which is cut or fails is an error
// and not a signal, as it would be through a memory map.

#include "ggml.h"

#include <atomic>
#include <cstdint>
#include <memory>
#include <string>
#include <unordered_map>
#include <vector>

namespace coreinfer {

// An open file; reads may come from several threads.
class File {
  public:
    explicit File(const std::string & path);
    ~File();
    File(const File &)             = delete;
    File & operator=(const File &) = delete;

    // Throws Error(COREINFER_IO) if not all of it can be read.
    void read(void * dst, size_t size, uint64_t offset) const;

    // The same past the page cache, where the system lets it. buffer starts at a multiple of kPage and has the
    // room of uncached_size(size); the result is where in it the bytes are.
    const uint8_t * read_uncached(uint8_t * buffer, size_t size, uint64_t offset) const;

    static constexpr size_t kPage = 4096;

    // Makes room for so many bytes to be read past the page cache, in memory that grows if it must.
    static uint8_t * room(std::vector<uint8_t> & memory, size_t size);

    static size_t uncached_size(size_t size) { return (size + 3 * kPage - 1) / kPage * kPage; }

    // From now on fetch() and read() leave nothing in the page cache.
    void leave_cache() { leave_cache_ = true; }

    // read() or, after leave_cache(), read_uncached(); buffer is as for the latter.
    const uint8_t * fetch(uint8_t * buffer, size_t size, uint64_t offset) const;

    // Throws Error(COREINFER_IO) if it is not as it was when it was opened.
    void check_unchanged() const;

  private:
    struct Identity {
        uint64_t size    = 0;
        int64_t  changed = 0; // in nanoseconds, or what the system counts in
    };

    Identity identity() const;

    std::string       path_;
    intptr_t          handle_;
    intptr_t          direct_      = -1; // reads past the page cache; -1 where that is not to be had
    std::atomic<bool> leave_cache_ = false;
    Identity          identity_;
};

// Where a tensor lies.
struct FileTensor {
    const File * file;
    uint64_t     offset;
    ggml_type    type;
    size_t       n_bytes;
};

class TensorFiles {
  public:
    explicit TensorFiles(const std::vector<std::string> & paths);

    // The stored tensor of this one's name, type and size, or nullptr.
    const FileTensor * find(const ggml_tensor * tensor) const;

    // See File.
    void leave_cache();
    void check_unchanged() const;

  private:
    std::vector<std::unique_ptr<File>>          files_;
    std::unordered_map<std::string, FileTensor> tensors_;
};

} // namespace coreinfer
