/* A CUDA driver that is none: memory of the host, launches that are only written down.

   Built by tests/test_devices.py into a libcuda.so.1, so that the real cuda-bindings and everything above them run on a
   machine without a GPU. It shows what is asked of a driver, and what asking costs; not what a GPU would answer. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

typedef int CUresult;
typedef uint64_t address;

enum { PARAMETERS = 8, LAUNCHES = 4096 };
struct launch {
    int64_t function, blocks, threads, stream, parameters[PARAMETERS];
};
static struct launch launches[LAUNCHES];
static int64_t launched, capturing, mode, fail_load, room = INT64_MAX, unrelaxed, synchronized, current;
static int64_t parameter_count = PARAMETERS;

/* For the tests. */
int64_t stub_launched(void) { return launched; }
const struct launch *stub_launches(void) { return launches; }
void stub_reset(void) { launched = unrelaxed = synchronized = 0; }
void stub_capture(int64_t on) { capturing = on; }
void stub_fail_load(int64_t on) { fail_load = on; }
void stub_room(int64_t bytes) { room = bytes; }
void stub_parameters(int64_t count) { parameter_count = count; }
int64_t stub_unrelaxed(void) { return unrelaxed; } /* calls that an unrelaxed capture forbids */
int64_t stub_synchronized(void) { return synchronized; }

static void risky(void) {
    if (capturing && mode != 2) unrelaxed++;
}

CUresult cuInit(unsigned flags) { return 0; }
CUresult cuDriverGetVersion(int *version) { *version = 13000; return 0; }
CUresult cuDeviceGetCount(int *count) { *count = 2; return 0; }
CUresult cuDeviceGet(int *device, int ordinal) { *device = ordinal; return ordinal < 2 ? 0 : 101; }
CUresult cuDeviceGetAttribute(int *value, int attribute, int device) {
    *value = attribute == 75 ? 9 : 0; /* 75: major, 76: minor */
    return 0;
}
CUresult cuDeviceGetName(char *name, int size, int device) { snprintf(name, size, "No GPU at all"); return 0; }
CUresult cuDevicePrimaryCtxRetain(void **context, int device) { *context = (void *)(intptr_t)(0x1000 + device); return 0; }
CUresult cuCtxGetCurrent(void **context) { *context = (void *)(intptr_t)current; return 0; }
CUresult cuCtxSetCurrent(void *context) { current = (intptr_t)context; return 0; }
CUresult cuCtxSynchronize(void) { risky(); synchronized++; return 0; }
CUresult cuMemAlloc(address *memory, size_t size) {
    risky();
    if ((int64_t)size > room) return 2;
    *memory = (address)(intptr_t)aligned_alloc(256, (size + 255) / 256 * 256);
    memset((void *)(intptr_t)*memory, 0xAB, size);
    return 0;
}
CUresult cuMemFree(address memory) { risky(); free((void *)(intptr_t)memory); return 0; }
CUresult cuMemGetInfo(size_t *free_, size_t *total) { *free_ = room < 1 << 30 ? room : 1 << 30; *total = 1 << 30; return 0; }
CUresult cuMemcpyHtoDAsync(address to, const void *from, size_t size, void *stream) {
    memcpy((void *)(intptr_t)to, from, size);
    return 0;
}
CUresult cuMemcpyDtoHAsync(void *to, address from, size_t size, void *stream) {
    memcpy(to, (void *)(intptr_t)from, size);
    return 0;
}
CUresult cuMemcpyDtoDAsync(address to, address from, size_t size, void *stream) {
    memmove((void *)(intptr_t)to, (void *)(intptr_t)from, size);
    return 0;
}
CUresult cuMemsetD8Async(address to, unsigned char value, size_t size, void *stream) {
    memset((void *)(intptr_t)to, value, size);
    return 0;
}
CUresult cuPointerGetAttribute(void *data, int attribute, address pointer) { *(int *)data = 0; return 0; }
CUresult cuModuleLoadData(void **module, const void *image) {
    risky();
    *module = (void *)image;
    return fail_load ? 209 : 0; /* no kernel image for the device */
}
CUresult cuModuleGetFunction(void **function, void *module, const char *name) {
    static int64_t count = 0x2000;
    *function = (void *)(intptr_t)++count;
    return 0;
}
CUresult cuLaunchKernel(void *function, unsigned bx, unsigned by, unsigned bz, unsigned tx, unsigned ty, unsigned tz,
                        unsigned shared, void *stream, void **parameters, void **extra) {
    struct launch *l = &launches[launched++ % LAUNCHES];
    l->function = (intptr_t)function, l->blocks = bx, l->threads = tx, l->stream = (intptr_t)stream;
    for (int k = 0; k < PARAMETERS; k++) l->parameters[k] = k < parameter_count ? *(int64_t *)parameters[k] : 0;
    return 0;
}
CUresult cuStreamCreate(void **stream, unsigned flags) { risky(); *stream = (void *)0x3000; return 0; }
CUresult cuStreamSynchronize(void *stream) {
    risky();
    if (stream != (void *)0x3000) synchronized++;
    return 0;
}
CUresult cuStreamIsCapturing(void *stream, int *status) { *status = capturing; return 0; }
CUresult cuThreadExchangeStreamCaptureMode(int *m) { int old = mode; mode = *m; *m = old; return 0; }
CUresult cuGetErrorString(CUresult error, const char **text) { *text = "the stub says no"; return 0; }
CUresult cuGetErrorName(CUresult error, const char **text) { *text = "STUB"; return 0; }

static CUresult missing(void) { return 801; /* not supported */ }

CUresult cuGetProcAddress_v2(const char *symbol, void **function, int version, uint64_t flags, int *found) {
    *function = dlsym(RTLD_DEFAULT, symbol);
    if (!*function) {
        void *self = dlopen("libcuda.so.1", RTLD_NOW | RTLD_NOLOAD);
        *function = self ? dlsym(self, symbol) : NULL;
    }
    if (!*function) *function = (void *)missing;
    if (found) *found = 0;
    return 0;
}
CUresult cuGetProcAddress(const char *symbol, void **function, int version, uint64_t flags) {
    return cuGetProcAddress_v2(symbol, function, version, flags, NULL);
}
