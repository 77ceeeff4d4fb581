#pragma once

namespace test {

// As long as one lives, operator new fails on this thread.
class NoMemory {
  public:
    NoMemory();
    ~NoMemory();
    NoMemory(const NoMemory &)             = delete;
    NoMemory & operator=(const NoMemory &) = delete;
};

} // namespace test
