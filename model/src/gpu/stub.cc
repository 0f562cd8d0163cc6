// Stands for NVIDIA's driver, NVRTC and cuBLAS in one test: what `cuda.rs` calls of them, with the
// parameters that their headers say, so that the calls themselves are run where there is no GPU.
// A kernel is the function that `shim.h` exports; memory is that of the process. The test puts
// `shim.h`, `kernels.cu` and a table of the kernels before this file.
#include <stdint.h>
#include <string.h>

#include <mutex>

typedef int Result;
typedef uint64_t Pointer;
static const Result NOT_FOUND = 500, INVALID = 1, OUT_OF_MEMORY = 2;

static const size_t ALL = 1ull << 34;
static const unsigned char MARK = 0xa5;
static const size_t GUARD = 64;
static thread_local void* current;
static char context;
static std::mutex one;  // the shim computes one launch at a time

static Result take(Pointer* to, size_t bytes) {
  if (bytes > ALL) return OUT_OF_MEMORY;
  unsigned char* room = (unsigned char*)malloc(GUARD + bytes + GUARD);
  memcpy(room, &bytes, sizeof bytes);
  memset(room + GUARD, 0xff, bytes);  // not a number
  memset(room + GUARD + bytes, MARK, GUARD);
  *to = (Pointer)(room + GUARD);
  return 0;
}

static Result give(Pointer at) {
  unsigned char* room = (unsigned char*)at - GUARD;
  size_t bytes;
  memcpy(&bytes, room, sizeof bytes);
  for (size_t i = 0; i < GUARD; i++)
    if (room[GUARD + bytes + i] != MARK) {
      fprintf(stderr, "written behind a buffer of %zu bytes\n", bytes);
      abort();
    }
  free(room);
  return 0;
}

extern "C" {
Result cuInit(unsigned flags) { return flags == 0 ? 0 : INVALID; }
Result cuDeviceGetCount(int* count) { *count = 1; return 0; }
Result cuDeviceGet(int* device, int ordinal) { *device = 7; return ordinal == 0 ? 0 : INVALID; }
Result cuDeviceGetName(char* name, int len, int device) {
  snprintf(name, len, "a stub");
  return device == 7 ? 0 : INVALID;
}
Result cuDeviceGetAttribute(int* value, int attribute, int) {
  // Few threads a block, capability 9.0, memory pools.
  *value = attribute == 1 ? 8 : attribute == 75 ? 9 : attribute == 115 ? 1 : 0;
  return 0;
}
Result cuDevicePrimaryCtxRetain(void** handle, int) { *handle = &context; return 0; }
Result cuDevicePrimaryCtxRelease_v2(int) { return 0; }
Result cuCtxSetCurrent(void* handle) { current = handle; return 0; }
Result cuCtxGetCurrent(void** handle) { *handle = current; return 0; }
Result cuGetErrorString(Result error, const char** text) {
  *text = error == OUT_OF_MEMORY ? "out of memory" : "refused by the stub";
  return 0;
}
Result cuMemGetInfo_v2(size_t* free, size_t* all) { *free = *all = ALL; return 0; }
Result cuDeviceGetDefaultMemPool(void** pool, int device) {
  *pool = &context;
  return device == 7 ? 0 : INVALID;
}
Result cuMemPoolSetAttribute(void* pool, int attribute, void* value) {
  return pool == &context && attribute == 4 && *(uint64_t*)value > 0 ? 0 : INVALID;
}
Result cuMemAllocAsync(Pointer* to, size_t bytes, void* stream) {
  return stream ? INVALID : take(to, bytes);
}
Result cuMemFreeAsync(Pointer at, void* stream) { return stream ? INVALID : give(at); }
Result cuMemcpyHtoD_v2(Pointer to, const void* from, size_t bytes) {
  memcpy((void*)to, from, bytes);
  return 0;
}
Result cuMemcpyDtoH_v2(void* to, Pointer from, size_t bytes) {
  memcpy(to, (const void*)from, bytes);
  return 0;
}
Result cuMemcpyDtoDAsync_v2(Pointer to, Pointer from, size_t bytes, void*) {
  memcpy((void*)to, (const void*)from, bytes);
  return 0;
}
Result cuMemsetD8Async(Pointer to, unsigned char value, size_t n, void*) {
  memset((void*)to, value, n);
  return 0;
}
Result cuStreamSynchronize(void*) { return 0; }
Result cuModuleLoadData(void** module, const void* image) {
  *module = &context;
  return memcmp(image, "\x7f" "ELF", 4) ? INVALID : 0;
}
Result cuModuleUnload(void*) { return 0; }
Result cuModuleGetFunction(void** function, void*, const char* name) {
  for (const Named& kernel : KERNELS)
    if (strcmp(kernel.name, name) == 0) {
      *function = (void*)kernel.launch;
      return 0;
    }
  return NOT_FOUND;
}
Result cuLaunchKernel(void* function, unsigned x, unsigned y, unsigned z, unsigned threads,
                      unsigned threads_y, unsigned threads_z, unsigned shared, void* stream,
                      void** args, void** extra) {
  // What every GPU allows.
  if (current != &context) return 201;  // invalid context
  if (z != 1 || threads_y != 1 || threads_z != 1 || stream || extra) return INVALID;
  if (x == 0 || y == 0 || y > 65535 || threads == 0 || threads > 8 || shared > 48 * 1024)
    return INVALID;
  const std::lock_guard<std::mutex> lock(one);
  float* room = (float*)malloc(shared + 4);
  memset(room, 0xff, shared);
  ((Launch)function)(x, y, threads, room, false, args);
  free(room);
  return 0;
}

Result nvrtcCreateProgram(void** program, const char* source, const char*, int headers,
                          const char* const*, const char* const*) {
  *program = strdup("");
  return strstr(source, "__global__") && headers == 0 ? 0 : 3;
}
Result nvrtcCompileProgram(void*, int count, const char* const* options) {
  for (int i = 0; i < count; i++)
    if (strcmp(options[i], "--gpu-architecture=sm_1") == 0) return 5;  // invalid option
  return 0;
}
Result nvrtcGetProgramLogSize(void*, size_t* size) { *size = 4; return 0; }
Result nvrtcGetProgramLog(void*, char* log) { memcpy(log, "log", 4); return 0; }
Result nvrtcGetCUBINSize(void*, size_t* size) { *size = 4; return 0; }
Result nvrtcGetCUBIN(void*, char* image) { memcpy(image, "\x7f" "ELF", 4); return 0; }
Result nvrtcDestroyProgram(void** program) { free(*program); return 0; }

Result cublasCreate_v2(void** handle) { *handle = &context; return 0; }
Result cublasDestroy_v2(void*) { return 0; }
Result cublasSetMathMode(void*, int mode) { return mode == 0 || mode == 3 ? 0 : 7; }
// As the reference BLAS has it; operation 0 is N, 1 is T.
Result cublasSgemm_v2(void*, int op_a, int op_b, int m, int n, int k, const float* alpha,
                      const float* a, int lda, const float* b, int ldb, const float* beta, float* c,
                      int ldc) {
  if (m < 0 || n < 0 || k < 0 || lda < (op_a ? k : m) || ldb < (op_b ? n : k) || ldc < m) return 7;
  for (int j = 0; j < n; j++)
    for (int i = 0; i < m; i++) {
      double sum = 0;
      for (int l = 0; l < k; l++)
        sum += (double)(op_a ? a[l + (size_t)i * lda] : a[i + (size_t)l * lda]) *
               (op_b ? b[j + (size_t)l * ldb] : b[l + (size_t)j * ldb]);
      float* to = c + i + (size_t)j * ldc;
      *to = *alpha * (float)sum + (*beta == 0 ? 0 : *beta * *to);
    }
  return 0;
}
}
