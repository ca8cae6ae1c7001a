/* A libnvidia-ml.so.1 for tests: two GPUs, the second with MIG. NVML_STUB says how it behaves:
 * ok, hang, crash, chatty, mismatch, denied, unloaded, lost, reset, bare, mute-power; NVML_STUB_PIDS names who computes.
 * Signatures and numbers are those of NVIDIA's documented C interface (nvml.h). */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

enum { SUCCESS = 0, NOT_SUPPORTED = 3, NO_PERMISSION = 4, NOT_FOUND = 6, INSUFFICIENT_SIZE = 7, NOT_LOADED = 9,
       IS_LOST = 15, RESET_REQUIRED = 16, MISMATCH = 18 };

typedef struct { int gpu, instance; } *device_t;
typedef struct { char legacy[16]; unsigned domain, bus, device, id, subsystem; char address[32]; } pci_t;
typedef struct { unsigned long long total, free, used; } memory_t;
typedef struct { unsigned pid; unsigned long long used; unsigned gpu_instance, compute_instance; } process_t;

static struct { int gpu, instance; } places[2][3] = {{{0, -1}}, {{1, -1}, {1, 0}, {1, 2}}};

static int behaves(const char *how) {
    const char *said = getenv("NVML_STUB");
    return strcmp(said ? said : "ok", how) == 0;
}

int nvmlInitWithFlags(unsigned flags) {
    (void)flags;
    if (behaves("hang")) for (;;) pause();
    if (behaves("crash")) abort();
    if (behaves("chatty")) { puts("NVML says hello"); fflush(stdout); }
    if (behaves("mismatch")) return MISMATCH;
    if (behaves("denied")) return NO_PERMISSION;
    if (behaves("unloaded")) return NOT_LOADED;
    return SUCCESS;
}

const char *nvmlErrorString(int code) {
    switch (code) {
    case MISMATCH: return "Driver/library version mismatch";
    case NO_PERMISSION: return "Insufficient Permissions";
    case NOT_LOADED: return "Driver Not Loaded";
    case IS_LOST: return "GPU is lost";
    case RESET_REQUIRED: return "GPU requires reset";
    default: return "Unknown Error";
    }
}

int nvmlSystemGetDriverVersion(char *text, unsigned length) { snprintf(text, length, "555.42.06"); return SUCCESS; }
int nvmlSystemGetCudaDriverVersion(int *version) { *version = 12050; return SUCCESS; }
int nvmlDeviceGetCount_v2(unsigned *count) { *count = 2; return SUCCESS; }

int nvmlDeviceGetHandleByIndex_v2(unsigned index, device_t *device) {
    if (behaves("lost") && index == 0) return IS_LOST;
    *device = (device_t)&places[index][0];
    return SUCCESS;
}

int nvmlDeviceGetPciInfo_v3(device_t device, pci_t *pci) {
    memset(pci, 0, sizeof *pci);
    snprintf(pci->address, sizeof pci->address, "00000000:%02X:00.0", device->gpu == 0 ? 0x01 : 0x4a);
    return SUCCESS;
}

int nvmlDeviceGetMinorNumber(device_t device, unsigned *minor) { *minor = device->gpu; return SUCCESS; }

int nvmlDeviceGetMemoryInfo(device_t device, memory_t *memory) {
    if (behaves("reset") && device->gpu == 0) return RESET_REQUIRED;
    memory->total = (device->instance >= 0 ? 10ULL : device->gpu == 0 ? 24ULL : 80ULL) << 30;
    memory->used = 1ULL << 28;
    memory->free = memory->total - memory->used;
    return SUCCESS;
}

int nvmlDeviceGetName(device_t device, char *text, unsigned length) {
    const char *name = device->gpu == 0 ? "NVIDIA GeForce RTX 4090" : "NVIDIA H100 PCIe";
    snprintf(text, length, device->instance >= 0 ? "%s MIG 1g.10gb" : "%s", name);
    return SUCCESS;
}

int nvmlDeviceGetUUID(device_t device, char *text, unsigned length) {
    const char *kind = device->instance >= 0 ? "MIG" : "GPU";
    snprintf(text, length, "%s-00000000-0000-4000-8000-%06d%06d", kind, device->gpu, device->instance + 1);
    return SUCCESS;
}

int nvmlDeviceGetCudaComputeCapability(device_t device, int *major, int *minor) {
    *major = device->gpu == 0 ? 8 : 9;
    *minor = device->gpu == 0 ? 9 : 0;
    return SUCCESS;
}

int nvmlDeviceGetTemperature(device_t device, int sensor, unsigned *celsius) {
    *celsius = 40 + device->gpu + sensor;
    return SUCCESS;
}

int nvmlDeviceGetPowerUsage(device_t device, unsigned *milliwatts) {
    if (behaves("mute-power")) return NOT_SUPPORTED;
    *milliwatts = 31400 + device->gpu;
    return SUCCESS;
}

int nvmlDeviceGetEnforcedPowerLimit(device_t device, unsigned *milliwatts) {
    (void)device;
    if (behaves("mute-power")) return NOT_SUPPORTED;
    *milliwatts = 450000;
    return SUCCESS;
}

int nvmlDeviceGetComputeRunningProcesses_v3(device_t device, unsigned *count, process_t *processes) {
    const char *pids = getenv("NVML_STUB_PIDS");
    unsigned room = *count, found = 0;
    char *copy = strdup(pids && device->gpu == 0 ? pids : "");
    for (char *pid = strtok(copy, ","); pid; pid = strtok(NULL, ","), found++)
        if (processes && found < room) {
            processes[found].pid = (unsigned)atoi(pid);
            processes[found].used = (found + 1ULL) << 20;
            processes[found].gpu_instance = processes[found].compute_instance = 0xFFFFFFFF;
        }
    free(copy);
    *count = found;
    return found > room || (found && !processes) ? INSUFFICIENT_SIZE : SUCCESS;
}

int nvmlDeviceGetGraphicsRunningProcesses_v3(device_t device, unsigned *count, process_t *processes) {
    (void)device, (void)processes;
    *count = 0;
    return SUCCESS;
}

int nvmlDeviceGetMigMode(device_t device, unsigned *current, unsigned *pending) {
    if (device->gpu == 0) return NOT_SUPPORTED;
    *current = *pending = 1;
    return SUCCESS;
}

int nvmlDeviceGetMaxMigDeviceCount(device_t device, unsigned *count) { (void)device; *count = 7; return SUCCESS; }

int nvmlDeviceGetMigDeviceHandleByIndex(device_t device, unsigned index, device_t *instance) {
    if (behaves("bare") || (index != 0 && index != 2)) return NOT_FOUND;
    *instance = (device_t)&places[device->gpu][index == 0 ? 1 : 2];
    return SUCCESS;
}

int nvmlDeviceGetGpuInstanceId(device_t device, unsigned *id) { *id = 7 + device->instance; return SUCCESS; }
int nvmlDeviceGetComputeInstanceId(device_t device, unsigned *id) { (void)device; *id = 0; return SUCCESS; }
