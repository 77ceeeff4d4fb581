#include "unread_buffer.h"

#include "error.h"
#include "ggml-backend-impl.h"

#include <cstdint>

#ifdef __linux__
#    include <sys/mman.h>
#    include <unistd.h>
#endif

namespace coreinfer {

namespace {

struct Reserved {
    void * base;
    size_t size;
    size_t n_tensors;
    bool   writable = false; // a tensor in it
};

Reserved & reserved(ggml_backend_buffer_t buffer) {
    return *static_cast<Reserved *>(buffer->context);
}

void free_buffer(ggml_backend_buffer_t buffer) {
#ifdef __linux__
    munmap(reserved(buffer).base, reserved(buffer).size);
#endif
    delete &reserved(buffer);
}

void * get_base(ggml_backend_buffer_t buffer) {
    return reserved(buffer).base;
}

ggml_status init_tensor(ggml_backend_buffer_t buffer, ggml_tensor * tensor) {
    reserved(buffer).n_tensors += tensor->view_src ? 0 : 1;
    return GGML_STATUS_SUCCESS;
}

// Data has nowhere to go.
void set_tensor(ggml_backend_buffer_t, ggml_tensor *, const void *, size_t, size_t) {}

void memset_tensor(ggml_backend_buffer_t, ggml_tensor *, uint8_t, size_t, size_t) {}

void clear(ggml_backend_buffer_t, uint8_t) {}

const char * get_name(ggml_backend_buffer_type_t) {
    return "Unread";
}

ggml_backend_buffer_t alloc_buffer(ggml_backend_buffer_type_t type, size_t size) {
    void * base = nullptr;
#ifdef __linux__
    if (size > 0) {
        base = mmap(nullptr, size, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        if (base == MAP_FAILED) {
            return nullptr;
        }
    }
#endif
    ggml_backend_buffer_i functions = {};
    functions.free_buffer           = free_buffer;
    functions.get_base              = get_base;
    functions.init_tensor           = init_tensor;
    functions.memset_tensor         = memset_tensor;
    functions.set_tensor            = set_tensor;
    functions.clear                 = clear;
    return ggml_backend_buffer_init(type, functions, new Reserved{ base, size, 0, false }, size);
}

size_t get_alignment(ggml_backend_buffer_type_t) {
    return 64;
}

// So that the CPU backend takes the graph in which other tensors take their place.
bool is_host(ggml_backend_buffer_type_t) {
    return true;
}

} // namespace

ggml_backend_buffer_type_t unread_buffer_type() {
#ifdef __linux__
    static ggml_backend_buffer_type type = {
        { get_name, alloc_buffer, get_alignment, nullptr, nullptr, is_host },
        ggml_backend_dev_by_type(GGML_BACKEND_DEVICE_TYPE_CPU),
        nullptr,
    };
    return &type;
#else
    return nullptr;
#endif
}

bool is_unread(const ggml_tensor * tensor) {
    ggml_backend_buffer_type_t type = unread_buffer_type();
    return type && tensor && tensor->buffer && ggml_backend_buffer_get_type(tensor->buffer) == type;
}

size_t n_tensors(ggml_backend_buffer_t buffer) {
    return reserved(buffer).n_tensors;
}

void make_writable(const ggml_tensor * tensor) {
    bool & writable = reserved(tensor->buffer).writable;
    if (writable) {
        throw Error(COREINFER_INVALID, "another context reads the weights of this model that are not in memory");
    }
#ifdef __linux__
    const uintptr_t page  = static_cast<uintptr_t>(sysconf(_SC_PAGESIZE));
    const uintptr_t start = reinterpret_cast<uintptr_t>(tensor->data) / page * page;
    const uintptr_t stop  = reinterpret_cast<uintptr_t>(tensor->data) + ggml_nbytes(tensor);
    if (mprotect(reinterpret_cast<void *>(start), stop - start, PROT_READ | PROT_WRITE) != 0) {
        throw Error(COREINFER_NO_MEMORY, "the system does not let weights that are not in memory be written to");
    }
    // what is written takes its pages, and not the huge ones around it
    madvise(reinterpret_cast<void *>(start), stop - start, MADV_NOHUGEPAGE);
#endif
    writable = true;
}

void make_unread(const ggml_tensor * tensor) {
    give_back(tensor->data, ggml_nbytes(tensor));
    reserved(tensor->buffer).writable = false;
}

void give_back(void * memory, size_t size) {
#ifdef __linux__
    const uintptr_t page  = static_cast<uintptr_t>(sysconf(_SC_PAGESIZE));
    const uintptr_t start = (reinterpret_cast<uintptr_t>(memory) + page - 1) / page * page;
    const uintptr_t stop  = (reinterpret_cast<uintptr_t>(memory) + size) / page * page;
    if (start < stop) {
        madvise(reinterpret_cast<void *>(start), stop - start, MADV_DONTNEED);
    }
#else
    (void) memory;
    (void) size;
#endif
}

} // namespace coreinfer
