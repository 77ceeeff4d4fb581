#include "mapped_pages.h"

#include "unread_buffer.h"

#include <algorithm>

#ifdef __linux__
#    include <sys/mman.h>
#    include <unistd.h>

#    include <cinttypes>
#    include <cstdio>
#    include <fstream>
#    include <string>
#endif

namespace coreinfer {

#ifdef __linux__

std::vector<MappedPages::Mapping> MappedPages::mappings() {
    std::vector<Mapping> result;
    std::ifstream        maps("/proc/self/maps");
    for (std::string line; std::getline(maps, line);) {
        uintptr_t start, end;
        char      access[5];
        int       name = 0;
        // what is written to a private mapping would be lost
        if (std::sscanf(line.c_str(), "%" SCNxPTR "-%" SCNxPTR " %4s %*s %*s %*s %n", &start, &end, access, &name) ==
                3 &&
            line[name] == '/' && access[3] == 's') {
            result.push_back({ start, end });
        }
    }
    return result;
}

bool MappedPages::has(const void * bytes, size_t size) {
    if (!is_read_) {
        mappings_ = mappings();
        is_read_  = true;
    }
    const auto start = reinterpret_cast<uintptr_t>(bytes);
    const auto where = std::find_if(mappings_.begin(), mappings_.end(), [&](const Mapping & mapping) {
        return mapping.start <= start && start + size <= mapping.end;
    });
    if (where == mappings_.end()) {
        return false;
    }
    if (!where->is_small) { // of a huge page all goes at once, and comes back at once
        madvise(reinterpret_cast<void *>(where->start), where->end - where->start, MADV_NOHUGEPAGE);
        where->is_small = true;
    }
    return true;
}

void MappedPages::give_back(const void * bytes, size_t size) {
    const auto page  = static_cast<uintptr_t>(sysconf(_SC_PAGESIZE));
    const auto from  = reinterpret_cast<uintptr_t>(bytes);
    const auto start = from == last_ ? from / page * page : from;
    last_            = from + size;
    coreinfer::give_back(reinterpret_cast<void *>(start), last_ - start);
}

#else

std::vector<MappedPages::Mapping> MappedPages::mappings() {
    return {};
}

bool MappedPages::has(const void *, size_t) {
    return false;
}

void MappedPages::give_back(const void *, size_t) {}

#endif

} // namespace coreinfer
