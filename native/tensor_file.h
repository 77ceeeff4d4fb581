#pragma once

// Reads the tensors of GGUF files with plain reads. If a file is cut or a disk fails, a read returns an error; a memory
// map would raise a signal.

#include "ggml.h"

#include <atomic>
#include <cstdint>
#include <memory>
#include <string>
#include <unordered_map>
#include <vector>

namespace coreinfer {

// An open file. Several threads may read at once.
class File {
  public:
    explicit File(const std::string & path);
    ~File();
    File(const File &)             = delete;
    File & operator=(const File &) = delete;

    // Reads size bytes at offset. Throws Error(COREINFER_IO) if it cannot read all of them.
    void read(void * dst, size_t size, uint64_t offset) const;

    // Reads like read(), but past the page cache where the system allows that. buffer starts at a multiple of kPage and
    // has uncached_size(size) bytes. Returns where in the buffer the bytes begin.
    const uint8_t * read_uncached(uint8_t * buffer, size_t size, uint64_t offset) const;

    static constexpr size_t kPage = 4096;

    // Returns a buffer for read_uncached() of size bytes. It is part of memory, which grows if necessary.
    static uint8_t * room(std::vector<uint8_t> & memory, size_t size);

    static size_t uncached_size(size_t size) { return (size + 3 * kPage - 1) / kPage * kPage; }

    // From now on fetch() and read() leave nothing in the page cache.
    void leave_cache() { leave_cache_ = true; }

    // Calls read() or, after leave_cache(), read_uncached(). buffer is as for read_uncached().
    const uint8_t * fetch(uint8_t * buffer, size_t size, uint64_t offset) const;

    // Throws Error(COREINFER_IO) if the file has changed since it was opened.
    void check_unchanged() const;

  private:
    struct Identity {
        uint64_t size    = 0;
        int64_t  changed = 0; // time of the last change, in units of the system
    };

    Identity identity() const;

    std::string       path_;
    intptr_t          handle_;
    intptr_t          direct_      = -1; // handle for reads past the page cache, -1 if the system has none
    std::atomic<bool> leave_cache_ = false;
    Identity          identity_;
};

// The place of a tensor in a file. The TensorFiles own the file.
struct FileTensor {
    const File * file;
    uint64_t     offset;
    ggml_type    type;
    size_t       n_bytes;
};

class TensorFiles {
  public:
    explicit TensorFiles(const std::vector<std::string> & paths);

    // The stored tensor with the name, type and size of this one, or nullptr. It is valid as long as this object.
    const FileTensor * find(const ggml_tensor * tensor) const;

    // The functions of File, for all files.
    void leave_cache();
    void check_unchanged() const;

  private:
    std::vector<std::unique_ptr<File>>          files_;
    std::unordered_map<std::string, FileTensor> tensors_;
};

} // namespace coreinfer
