// A CUDA driver that does nothing: as much of libcuda.so.1 as Triton's own driver module calls. It counts launches.

long long stub_launches = 0;

int cuInit(unsigned flags) { return 0; }
int cuDriverGetVersion(int* version) { return *version = 13000, 0; }
int cuGetErrorString(int code, const char** text) { return *text = "an error of the stub", 0; }
int cuDeviceGet(int* device, int ordinal) { return *device = ordinal, 0; }
int cuDeviceGetAttribute(int* value, int attribute, int device) { return *value = 1 << 18, 0; }
int cuDevicePrimaryCtxRetain(void** context, int device) { return *context = &stub_launches, 0; }
int cuCtxGetCurrent(void** context) { return *context = &stub_launches, 0; }
int cuCtxSetCurrent(void* context) { return 0; }
int cuCtxGetLimit(unsigned long* value, int limit) { return *value = 0, 0; }
int cuCtxSetLimit(int limit, unsigned long value) { return 0; }
int cuModuleLoadData(void** module, const void* image) { return *module = &stub_launches, 0; }
int cuModuleGetFunction(void** function, void* module, const char* name) { return *function = module, 0; }
// Attribute 0 is the most threads of a block.
int cuFuncGetAttribute(int* value, int attribute, void* function) { return *value = attribute == 0 ? 1024 : 0, 0; }
int cuFuncSetAttribute(void* function, int attribute, int value) { return 0; }
int cuFuncSetCacheConfig(void* function, int config) { return 0; }
int cuPointerGetAttribute(unsigned long long* value, int attribute, unsigned long long pointer) {
  return *value = pointer, 0;
}
int cuPointerGetAttributes(unsigned count, int* attributes, void** values, unsigned long long pointer) { return 0; }
int cuOccupancyMaxActiveClusters(int* count, void* function, const void* config) { return *count = 1, 0; }
int cuTensorMapEncodeTiled(void) { return 0; }
int cuTensorMapEncodeIm2col(void) { return 0; }
int cuLaunchKernelEx(const void* config, void* function, void** parameters, void** extra) { return ++stub_launches, 0; }
int cuLaunchKernel(void) { return ++stub_launches, 0; }
