// Pages of mapped files that are given back.

#include "mapped_pages.h"

#include "check.h"
#include "model.h"

#include <algorithm>
#include <vector>

#ifdef __linux__

#    include <fcntl.h>
#    include <sys/mman.h>
#    include <unistd.h>

#    include <cinttypes>
#    include <cstdio>
#    include <fstream>
#    include <string>

using namespace coreinfer;
using namespace test;

// Kilobytes that this process has of the mapping at memory.
static int resident(const void * memory) {
    std::ifstream smaps("/proc/self/smaps");
    bool          is_here = false;
    for (std::string line; std::getline(smaps, line);) {
        uintptr_t start, end;
        int       size;
        if (std::sscanf(line.c_str(), "%" SCNxPTR "-%" SCNxPTR " ", &start, &end) == 2) {
            is_here = start == reinterpret_cast<uintptr_t>(memory);
        } else if (is_here && std::sscanf(line.c_str(), "Rss: %d kB", &size) == 1) {
            return size;
        }
    }
    return -1;
}

namespace {

struct Mapped {
    static constexpr size_t kSize = 64 << 12;

    explicit Mapped(int flags) {
        const int            fd = open(file.path(), O_RDWR | O_CREAT, 0600);
        std::vector<uint8_t> bytes(kSize);
        for (size_t i = 0; i < kSize; ++i) {
            bytes[i] = static_cast<uint8_t>(i % 251);
        }
        CHECK(write(fd, bytes.data(), kSize) == static_cast<ssize_t>(kSize));
        memory = static_cast<uint8_t *>(mmap(nullptr, kSize, PROT_READ | PROT_WRITE, flags | MAP_POPULATE, fd, 0));
        close(fd);
        CHECK(memory != MAP_FAILED);
    }

    ~Mapped() { munmap(memory, kSize); }

    bool is_whole() const {
        for (size_t i = 0; i < kSize; ++i) {
            if (memory[i] != i % 251) {
                return false;
            }
        }
        return true;
    }

    TempFile  file;
    uint8_t * memory;
};

} // namespace

TEST(pages_of_a_shared_mapping_go_and_come_back_as_they_were) {
    const Mapped mapped(MAP_SHARED);
    if (resident(mapped.memory) == 0) {
        return; // qemu's user mode counts none
    }
    CHECK(resident(mapped.memory) == 256);
    MappedPages pages;
    CHECK(pages.has(mapped.memory + 100, 40000));
    pages.give_back(mapped.memory + 100, 40000 - 100); // pages 1 to 8, and of 0 and 9 a part
    CHECK(resident(mapped.memory) == 256 - 8 * 4);
    pages.give_back(mapped.memory + 40000, 8192); // page 9 too, which has nothing else, and 10
    CHECK(resident(mapped.memory) == 256 - 10 * 4);
    CHECK(mapped.is_whole());
}

TEST(other_memory_is_left_alone) {
    const Mapped  in_private(MAP_PRIVATE);
    MappedPages   pages;
    const Mapped  later(MAP_SHARED);
    const uint8_t heap[16] = {};
    CHECK(!pages.has(heap, sizeof(heap)));
    CHECK(!pages.has(in_private.memory, Mapped::kSize));
    CHECK(!MappedPages().has(later.memory, Mapped::kSize + 1));
}

#else

TEST(nothing_is_given_back_elsewhere) {
    const uint8_t heap[16] = {};
    CHECK(!coreinfer::MappedPages().has(heap, sizeof(heap)));
}

#endif
