#include "row_lookup.h"

#include "unread_buffer.h"

#include <algorithm>
#include <cstring>
#include <exception>
#include <iterator>
#include <utility>

namespace coreinfer {

RowLookup::RowLookup(ggml_tensor * matrix, const FileTensor & file) :
    matrix_(matrix), file_(file), held_(static_cast<size_t>(matrix->ne[1])) {
    make_writable(matrix);
}

RowLookup::~RowLookup() {
    make_unread(matrix_);
}

void RowLookup::fetch(const int32_t * rows, int64_t n) noexcept {
    if (failed_) {
        return;
    }
    try {
        std::vector<int32_t> wanted = missing(rows, n);
        if (wanted.empty()) {
            return;
        }
        if (n_held_ > 0 && n_held_ + wanted.size() > kMostRows) {
            give_back(matrix_->data, ggml_nbytes(matrix_));
            held_.assign(held_.size(), false);
            n_held_ = 0;
            wanted  = missing(rows, n);
        }
        file_.file->check_unchanged();
        for (const int32_t row : wanted) {
            read(row);
        }
    } catch (const Error & error) {
        error_  = error;
        failed_ = true;
    } catch (const std::exception &) {
        failed_ = true; // there is no memory to say so
    }
}

std::vector<int32_t> RowLookup::missing(const int32_t * rows, int64_t n) const {
    std::vector<int32_t> result;
    std::copy_if(rows, rows + n, std::back_inserter(result),
                 [&](int32_t row) { return !held_[static_cast<size_t>(row)]; });
    std::sort(result.begin(), result.end());
    result.erase(std::unique(result.begin(), result.end()), result.end());
    return result;
}

void RowLookup::read(int32_t row) {
    const size_t    size   = matrix_->nb[1];
    const size_t    offset = static_cast<size_t>(row) * size;
    uint8_t * const room   = File::room(memory_, size);
    std::memcpy(static_cast<uint8_t *>(matrix_->data) + offset, file_.file->fetch(room, size, file_.offset + offset),
                size);
    held_[static_cast<size_t>(row)] = true;
    ++n_held_;
}

std::optional<Error> RowLookup::take_error() {
    std::optional<Error> error = std::move(error_);
    if (failed_ && !error) {
        error.emplace(COREINFER_NO_MEMORY, "no memory for the rows of the embedding");
    }
    error_.reset();
    failed_ = false;
    return error;
}

} // namespace coreinfer
