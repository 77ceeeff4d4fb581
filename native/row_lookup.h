#pragma once

// The embedding of a model, of which only the rows that are looked up are in memory.

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
    // How many rows stay in memory at the most, unless more are needed at once.
    static constexpr size_t kMostRows = 512;

    // matrix is an unread tensor that no other looks rows up in, file where it lies; both must live as long as this.
    RowLookup(ggml_tensor * matrix, const FileTensor & file);
    ~RowLookup();
    RowLookup(const RowLookup &)             = delete;
    RowLookup & operator=(const RowLookup &) = delete;

    // Read those of these rows that are not in memory. After a failure it returns at once.
    void fetch(const int32_t * rows, int64_t n) noexcept;

    // Whether reading has failed, so that what is being evaluated is worth nothing.
    bool failed() const { return failed_; }

    // Why reading has failed, if it has; it is forgotten.
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
