#pragma once

// Reads the tensors of GGUF files with plain reads, so that a file which is cut or fails is an error
// and not a signal, as it would be through a memory map.

#include "ggml.h"

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

  private:
    std::string path_;
    intptr_t    handle_;
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

  private:
    std::vector<std::unique_ptr<File>>          files_;
    std::unordered_map<std::string, FileTensor> tensors_;
};

} // namespace coreinfer
