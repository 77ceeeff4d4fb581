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
#    include <sys/stat.h>
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
    handle_   = reinterpret_cast<intptr_t>(handle);
    identity_ = identity();
}

File::~File() {
    CloseHandle(reinterpret_cast<HANDLE>(handle_));
}

File::Identity File::identity() const {
    BY_HANDLE_FILE_INFORMATION info = {};
    GetFileInformationByHandle(reinterpret_cast<HANDLE>(handle_), &info);
    const auto joined = [](DWORD high, DWORD low) { return (static_cast<uint64_t>(high) << 32) | low; };
    return { joined(info.nFileSizeHigh, info.nFileSizeLow),
             static_cast<int64_t>(joined(info.ftLastWriteTime.dwHighDateTime, info.ftLastWriteTime.dwLowDateTime)) };
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
    try {
        identity_ = identity();
    } catch (...) { // no destructor closes what a constructor that fails has opened
        close(static_cast<int>(handle_));
        throw;
    }
#    ifdef O_DIRECT
    direct_ = open(path.c_str(), O_RDONLY | O_CLOEXEC | O_DIRECT);
#    endif
}

File::~File() {
    close(static_cast<int>(handle_));
    if (direct_ >= 0) {
        close(static_cast<int>(direct_));
    }
}

File::Identity File::identity() const {
    struct stat info = {};
    if (fstat(static_cast<int>(handle_), &info) != 0) {
        throw Error(COREINFER_IO, path_ + ": cannot be looked at: " + system_reason());
    }
#    ifdef __APPLE__
    const timespec changed = info.st_mtimespec;
#    else
    const timespec changed = info.st_mtim;
#    endif
    return { static_cast<uint64_t>(info.st_size),
             static_cast<int64_t>(changed.tv_sec) * 1000000000 + static_cast<int64_t>(changed.tv_nsec) };
}

static int64_t read_some(intptr_t handle, void * dst, size_t size, uint64_t offset) {
    ssize_t n;
    do {
        n = pread(static_cast<int>(handle), dst, size, static_cast<off_t>(offset));
    } while (n < 0 && errno == EINTR);
    return n;
}

#endif

uint8_t * File::room(std::vector<uint8_t> & memory, size_t size) {
    if (memory.size() < uncached_size(size) + kPage) {
        memory.resize(uncached_size(size) + kPage);
    }
    return memory.data() + (kPage - reinterpret_cast<uintptr_t>(memory.data()) % kPage) % kPage;
}

void File::read(void * dst, size_t size, uint64_t offset) const {
    auto *   out = static_cast<uint8_t *>(dst);
    uint64_t at  = offset;
    while (size > 0) {
        const int64_t n = read_some(handle_, out, size, at);
        if (n < 0) {
            throw Error(COREINFER_IO,
                        path_ + ": reading failed at byte " + std::to_string(at) + ": " + system_reason());
        }
        if (n == 0) {
            throw Error(COREINFER_IO, path_ + ": ends at byte " + std::to_string(at) +
                                          ", before the tensors do; it was cut since it was loaded");
        }
        out += n;
        at += static_cast<uint64_t>(n);
        size -= static_cast<size_t>(n);
    }
#ifdef POSIX_FADV_DONTNEED
    if (leave_cache_) {
        posix_fadvise(static_cast<int>(handle_), static_cast<off_t>(offset), static_cast<off_t>(at - offset),
                      POSIX_FADV_DONTNEED);
    }
#endif
}

const uint8_t * File::read_uncached(uint8_t * buffer, size_t size, uint64_t offset) const {
    const uint64_t start = offset / kPage * kPage;
    const size_t   skip  = static_cast<size_t>(offset - start);
    if (direct_ >= 0) {
        // up to the end of the page, or of the file; what is short of that is asked for again below
        const int64_t n = read_some(direct_, buffer, (skip + size + kPage - 1) / kPage * kPage, start);
        if (n >= static_cast<int64_t>(skip + size)) {
            return buffer + skip;
        }
    }
    read(buffer + skip, size, offset);
    return buffer + skip;
}

const uint8_t * File::fetch(uint8_t * buffer, size_t size, uint64_t offset) const {
    if (leave_cache_) {
        return read_uncached(buffer, size, offset);
    }
    read(buffer, size, offset);
    return buffer;
}

void File::check_unchanged() const {
    const Identity now = identity();
    if (now.size != identity_.size) {
        throw Error(COREINFER_IO, path_ + ": ends at byte " + std::to_string(now.size) + " now, and at " +
                                      std::to_string(identity_.size) +
                                      " when it was loaded; it was cut or written to: load the model again");
    }
    if (now.changed != identity_.changed) {
        throw Error(COREINFER_IO, path_ + ": was written to since it was loaded: load the model again");
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

void TensorFiles::leave_cache() {
    for (const auto & file : files_) {
        file->leave_cache();
    }
}

void TensorFiles::check_unchanged() const {
    for (const auto & file : files_) {
        file->check_unchanged();
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
