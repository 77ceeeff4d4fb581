#pragma once

// Keeps only those rows of the embedding in memory that tokens have looked up.

#include "error.h"
#include "ggml.h"
#include "tensor_file.h"

#include <atomic>
#include <cstdint>
#include <optional>
#include <vector>

namespace coreinfer {

class RowLookup {
  public:
    // At most this many rows stay in memory, unless one batch needs more.
    static constexpr size_t kMostRows = 512;

    // matrix is an unread tensor, and file its place in the model file. The caller owns both, and keeps them for as
    // long as this object. Only one RowLookup at a time can use a matrix.
    RowLookup(ggml_tensor * matrix, const FileTensor & file);
    ~RowLookup();
    RowLookup(const RowLookup &)             = delete;
    RowLookup & operator=(const RowLookup &) = delete;

    // Reads those of the n rows that are not in memory. Does nothing after a failure.
    void fetch(const int32_t * rows, int64_t n) noexcept;

    // Whether reading has failed. The result of the evaluation is then wrong.
    bool failed() const { return failed_; }

    // Returns why reading has failed, if it has, and forgets it.
    std::optional<Error> take_error();

    size_t n_held() const { return n_held_; }

    const ggml_tensor * matrix() const { return matrix_; }

  private:
    std::vector<int32_t> missing(const int32_t * rows, int64_t n) const;
    void                 read(int32_t row);

    ggml_tensor *        matrix_;
    FileTensor           file_;
    std::vector<bool>    held_;
    size_t               n_held_ = 0;
    std::vector<uint8_t> memory_;
    std::optional<Error> error_;
    std::atomic<bool>    failed_ = false;
};

} // namespace coreinfer
