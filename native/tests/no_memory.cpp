#include "no_memory.h"

#include <cstdlib>
#include <new>

static thread_local bool none_left = false;

test::NoMemory::NoMemory() {
    none_left = true;
}

test::NoMemory::~NoMemory() {
    none_left = false;
}

void * operator new(std::size_t size, const std::nothrow_t &) noexcept {
    return none_left ? nullptr : std::malloc(size > 0 ? size : 1);
}

void * operator new(std::size_t size) {
    void * memory = operator new(size, std::nothrow);
    if (!memory) {
        throw std::bad_alloc();
    }
    return memory;
}

void operator delete(void * memory) noexcept {
    std::free(memory);
}

void operator delete(void * memory, std::size_t) noexcept {
    std::free(memory);
}

void operator delete(void * memory, const std::nothrow_t &) noexcept {
    std::free(memory);
}
