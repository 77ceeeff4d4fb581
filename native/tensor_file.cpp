#include "tensor_file.h"

#include "error.h"
#include "ggml-cpp.h"
#include "gguf.h"

#include <algorithm>
#include <cerrno>
#include <cstring>

#ifdef _WIN32
#    define WIN32_LEAN_AND_MEAN
#    define NOMINMAX
#    include <windows.h>
#else
#    include <fcntl.h>
#    include <unistd.h>
#endif

namespace coreinfer {

#ifdef _WIN32

static std::string system_reason() {
    return "error " + std::to_string(GetLastError());
}

static std::wstring utf16(const std::string & text) {
    const int    n = MultiByteToWideChar(CP_UTF8, 0, text.c_str(), -1, nullptr, 0);
    std::wstring result(n, 0);
    MultiByteToWideChar(CP_UTF8, 0, text.c_str(), -1, &result[0], n);
    return result;
}

File::File(const std::string & path) : path_(path) {
    HANDLE handle = CreateFileW(utf16(path).c_str(), GENERIC_READ, FILE_SHARE_READ, nullptr, OPEN_EXISTING,
                                FILE_ATTRIBUTE_NORMAL, nullptr);
    if (handle == INVALID_HANDLE_VALUE) {
        throw Error(COREINFER_IO, path + ": cannot be opened: " + system_reason());
    }
    handle_ = reinterpret_cast<intptr_t>(handle);
}

File::~File() {
    CloseHandle(reinterpret_cast<HANDLE>(handle_));
}

static int64_t read_some(intptr_t handle, void * dst, size_t size, uint64_t offset) {
    OVERLAPPED at = {};
    at.Offset     = static_cast<DWORD>(offset);
    at.OffsetHigh = static_cast<DWORD>(offset >> 32);
    DWORD n       = 0;
    if (!ReadFile(reinterpret_cast<HANDLE>(handle), dst, static_cast<DWORD>(std::min<size_t>(size, 1u << 30)), &n,
                  &at)) {
        return GetLastError() == ERROR_HANDLE_EOF ? 0 : -1;
    }
    return n;
}

#else

static std::string system_reason() {
    return std::strerror(errno);
}

File::File(const std::string & path) : path_(path), handle_(open(path.c_str(), O_RDONLY | O_CLOEXEC)) {
    if (handle_ < 0) {
        throw Error(COREINFER_IO, path + ": cannot be opened: " + system_reason());
    }
}

File::~File() {
    close(static_cast<int>(handle_));
}

static int64_t read_some(intptr_t handle, void * dst, size_t size, uint64_t offset) {
    ssize_t n;
    do {
        n = pread(static_cast<int>(handle), dst, size, static_cast<off_t>(offset));
    } while (n < 0 && errno == EINTR);
    return n;
}

#endif

void File::read(void * dst, size_t size, uint64_t offset) const {
    auto * out = static_cast<uint8_t *>(dst);
    while (size > 0) {
        const int64_t n = read_some(handle_, out, size, offset);
        if (n < 0) {
            throw Error(COREINFER_IO,
                        path_ + ": reading failed at byte " + std::to_string(offset) + ": " + std::strerror(errno));
        }
        if (n == 0) {
            throw Error(COREINFER_IO, path_ + ": ends at byte " + std::to_string(offset) +
                                          ", before the tensors do; it was cut since it was loaded");
        }
        out += n;
        offset += static_cast<uint64_t>(n);
        size -= static_cast<size_t>(n);
    }
}

TensorFiles::TensorFiles(const std::vector<std::string> & paths) {
    for (const std::string & path : paths) {
        files_.push_back(std::make_unique<File>(path));

        const gguf_context_ptr owner(gguf_init_from_file(path.c_str(), { /*.no_alloc =*/true, /*.ctx =*/nullptr }));
        const gguf_context *   header = owner.get();
        if (!header) {
            throw Error(COREINFER_IO, path + ": is not a readable GGUF file");
        }
        const uint64_t data = gguf_get_data_offset(header);
        for (int64_t i = 0; i < gguf_get_n_tensors(header); ++i) {
            tensors_[gguf_get_tensor_name(header, i)] = { files_.back().get(), data + gguf_get_tensor_offset(header, i),
                                                          gguf_get_tensor_type(header, i),
                                                          gguf_get_tensor_size(header, i) };
        }
    }
}

const FileTensor * TensorFiles::find(const ggml_tensor * tensor) const {
    const auto it = tensors_.find(ggml_get_name(tensor));
    if (it == tensors_.end() || it->second.type != tensor->type || it->second.n_bytes != ggml_nbytes(tensor)) {
        return nullptr;
    }
    return &it->second;
}

} // namespace coreinfer
