// Loaded before a process begins (LD_PRELOAD), it remembers the memory of torch's tensors on the CPU: which allocation holds an
// address?
#include <dlfcn.h>

#include <cstddef>
#include <cstdint>
#include <map>
#include <mutex>

namespace {

std::mutex& mutex() {
  static auto* const one = new std::mutex;
  return *one;
}

std::map<uintptr_t, size_t>& sizes() {
  static auto* const all = new std::map<uintptr_t, size_t>;
  return *all;
}

}  // namespace

extern "C" {

int posix_memalign(void** memory, size_t alignment, size_t size) {
  using Function = int (*)(void**, size_t, size_t);
  static const auto real = reinterpret_cast<Function>(dlsym(RTLD_NEXT, "posix_memalign"));
  const int error = real(memory, alignment, size);
  if (error == 0) {
    const std::lock_guard<std::mutex> lock(mutex());
    const auto begin = reinterpret_cast<uintptr_t>(*memory);
    // What overlaps was freed.
    auto& all = sizes();
    auto old = all.lower_bound(begin);
    if (old != all.begin() && std::prev(old)->first + std::prev(old)->second > begin) --old;
    while (old != all.end() && old->first < begin + size) old = all.erase(old);
    all[begin] = size;
  }
  return error;
}

// The bytes of the allocation that holds the address, and where it begins; 0 where none does.
size_t diffpp_allocation(uintptr_t address, uintptr_t* begin) {
  const std::lock_guard<std::mutex> lock(mutex());
  auto found = sizes().upper_bound(address);
  if (found == sizes().begin()) return 0;
  --found;
  *begin = found->first;
  return address < found->first + found->second ? found->second : 0;
}

}  // extern "C"
