// Threads. torch brings its own OpenMP runtime; linking another would start a second pool that fights the first for the
// cores. So the runtime already in the process is looked up by name and used; without one, std::thread serves.
#include <dlfcn.h>
#include <link.h>

#include <cstring>
#include <thread>
#include <vector>

#include "kernels.h"

namespace nibble {
namespace {

struct OpenMp {
  void (*parallel)(void (*fn)(void*), void* data, unsigned threads, unsigned flags);
  int (*thread_num)();
  int (*num_threads)();
};

int find_runtime(dl_phdr_info* info, size_t, void* out) {
  const char* slash = strrchr(info->dlpi_name, '/');
  const char* name = slash ? slash + 1 : info->dlpi_name;
  if (strncmp(name, "libgomp", 7) != 0 && strncmp(name, "libiomp5", 8) != 0 && strncmp(name, "libomp", 6) != 0)
    return 0;
  void* library = dlopen(info->dlpi_name, RTLD_NOLOAD | RTLD_LAZY);
  if (!library) return 0;
  OpenMp found;
  found.parallel = reinterpret_cast<decltype(found.parallel)>(dlsym(library, "GOMP_parallel"));
  found.thread_num = reinterpret_cast<decltype(found.thread_num)>(dlsym(library, "omp_get_thread_num"));
  found.num_threads = reinterpret_cast<decltype(found.num_threads)>(dlsym(library, "omp_get_num_threads"));
  if (!found.parallel || !found.thread_num || !found.num_threads) return 0;
  *static_cast<OpenMp*>(out) = found;
  return 1;
}

const OpenMp& openmp() {
  static const OpenMp runtime = [] {
    OpenMp found{};
    dl_iterate_phdr(find_runtime, &found);
    return found;
  }();
  return runtime;
}

struct Job {
  void (*fn)(void*, int64_t);
  void* context;
  int64_t chunks;

  void share(int64_t first, int64_t step) const {
    for (int64_t i = first; i < chunks; i += step) fn(context, i);
  }
};

void openmp_body(void* data) {
  static_cast<const Job*>(data)->share(openmp().thread_num(), openmp().num_threads());
}

}  // namespace

void parallel_for(int threads, int64_t chunks, void (*fn)(void*, int64_t), void* context) {
  const int64_t workers = threads < chunks ? threads : chunks;
  Job job{fn, context, chunks};
  if (workers <= 1) return job.share(0, 1);
  if (openmp().parallel) return openmp().parallel(openmp_body, &job, static_cast<unsigned>(workers), 0);
  std::vector<std::thread> others;
  for (int64_t i = 1; i < workers; ++i) others.emplace_back([&job, i, workers] { job.share(i, workers); });
  job.share(0, workers);
  for (std::thread& other : others) other.join();
}

}  // namespace nibble
