// What `kernels.cu` needs to run on the CPU, for the tests: a block's threads are coroutines that
// change at every barrier, one after the other, so a missing barrier shows as a wrong result.
#define HOST_SHIM
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <ucontext.h>
#include <utility>

#define __global__
#define __device__ static
#define SHARED(name) float* name = shim_shared
#define __syncthreads() shim_barrier()

struct Dim { unsigned x, y, z; };
static Dim threadIdx, blockIdx, blockDim, gridDim;
static float* shim_shared;

static const unsigned MOST_THREADS = 256;
static const size_t STACK = 64 * 1024;
static ucontext_t shim_main, shim_threads[MOST_THREADS];
static char* shim_stacks;
static bool shim_done[MOST_THREADS];
static void (*shim_body)(void*);
static void* shim_given;

static void shim_barrier() { swapcontext(&shim_threads[threadIdx.x], &shim_main); }

static void shim_entry() {
  shim_body(shim_given);
  shim_done[threadIdx.x] = true;
}

// All blocks, one after the other. `backwards` turns the order of the threads round. Ends the
// process when only some threads of a block come to a barrier: a GPU would hang.
static void shim_run(unsigned blocks_x, unsigned blocks_y, unsigned threads, bool backwards,
                     void (*body)(void*), void* given) {
  if (threads > MOST_THREADS) abort();
  if (!shim_stacks) shim_stacks = (char*)malloc(MOST_THREADS * STACK);
  gridDim = Dim{blocks_x, blocks_y, 1};
  blockDim = Dim{threads, 1, 1};
  shim_body = body;
  shim_given = given;
  for (unsigned y = 0; y < blocks_y; y++)
    for (unsigned x = 0; x < blocks_x; x++) {
      blockIdx = Dim{x, y, 0};
      for (unsigned i = 0; i < threads; i++) {
        shim_done[i] = false;
        getcontext(&shim_threads[i]);
        shim_threads[i].uc_stack.ss_sp = shim_stacks + i * STACK;
        shim_threads[i].uc_stack.ss_size = STACK;
        shim_threads[i].uc_link = &shim_main;
        makecontext(&shim_threads[i], shim_entry, 0);
      }
      unsigned left = threads;
      while (left > 0) {
        unsigned ended = 0;
        for (unsigned i = 0; i < threads; i++) {
          const unsigned t = backwards ? threads - 1 - i : i;
          threadIdx = Dim{t, 0, 0};
          swapcontext(&shim_main, &shim_threads[t]);
          if (shim_done[t]) ended++;
        }
        if (ended != 0 && ended != threads) {
          fprintf(stderr, "only %u of %u threads meet a barrier\n", threads - ended, threads);
          abort();
        }
        left -= ended;
      }
    }
}

template <typename... A>
struct ShimCall {
  void (*kernel)(A...);
  void** args;
  template <size_t... I>
  void with(std::index_sequence<I...>) { kernel(*(A*)args[I]...); }
  static void body(void* self) { ((ShimCall*)self)->with(std::index_sequence_for<A...>()); }
};

template <typename... A>
static void shim_launch(void (*kernel)(A...), unsigned x, unsigned y, unsigned threads,
                        float* shared, bool backwards, void** args) {
  ShimCall<A...> call = {kernel, args};
  shim_shared = shared;
  shim_run(x, y, threads, backwards, &ShimCall<A...>::body, &call);
}

// Makes a kernel callable under the name `host_NAME`; also tells how many arguments it has.
template <typename... A>
static constexpr unsigned shim_count(void (*)(A...)) { return sizeof...(A); }
#define EXPORT(name)                                                                            \
  extern "C" unsigned host_##name(unsigned x, unsigned y, unsigned threads, float* shared,      \
                                  bool backwards, void** args) {                                \
    if (args) shim_launch(name, x, y, threads, shared, backwards, args);                        \
    return shim_count(name);                                                                    \
  }
