/* The binary layout of DLPack 1.x and of its C exchange table, as far as epmoe uses it.
 *
 * Layout and meaning follow the public DLPack specification (https://dmlc.github.io/dlpack). It is declared here so
 * that building epmoe needs neither a DLPack checkout nor PyTorch's headers. Names match the specification. */
#ifndef EPMOE_DLPACK_ABI_H_
#define EPMOE_DLPACK_ABI_H_

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define DLPACK_ABI_MAJOR 1

typedef struct {
  uint32_t major;
  uint32_t minor;
} DLPackVersion;

enum {
  kDLCPU = 1,
  kDLCUDA = 2,
  kDLCUDAHost = 3, /* page-locked host memory */
  kDLCUDAManaged = 13,
};

typedef struct {
  int32_t device_type;
  int32_t device_id;
} DLDevice;

enum {
  kDLInt = 0,
  kDLUInt = 1,
  kDLFloat = 2,
  kDLBfloat = 4,
  kDLComplex = 5,
  kDLBool = 6,
  kDLFloat8_e4m3fn = 10,
};

typedef struct {
  uint8_t code;
  uint8_t bits;
  uint16_t lanes;
} DLDataType;

typedef struct {
  void *data;
  DLDevice device;
  int32_t ndim;
  DLDataType dtype;
  int64_t *shape;
  int64_t *strides; /* in elements; NULL means row-major contiguous */
  uint64_t byte_offset;
} DLTensor;

/* Ownership: whoever holds one of these calls `deleter` exactly once, from any thread. */
typedef struct DLManagedTensor {
  DLTensor dl_tensor;
  void *manager_ctx;
  void (*deleter)(struct DLManagedTensor *self);
} DLManagedTensor;

#define DLPACK_FLAG_BITMASK_READ_ONLY (1UL << 0UL)

typedef struct DLManagedTensorVersioned {
  DLPackVersion version;
  void *manager_ctx;
  void (*deleter)(struct DLManagedTensorVersioned *self);
  uint64_t flags;
  DLTensor dl_tensor;
} DLManagedTensorVersioned;

typedef struct DLPackExchangeAPIHeader {
  DLPackVersion version;
  struct DLPackExchangeAPIHeader *prev_api; /* an older table, or NULL */
} DLPackExchangeAPIHeader;

/* The table a framework hangs on its tensor type as the capsule `__dlpack_c_exchange_api__`. Every function returns 0,
 * or -1 with an error pending in the framework's own runtime. None of them synchronises a stream. */
typedef struct DLPackExchangeAPI {
  DLPackExchangeAPIHeader header;
  void *managed_tensor_allocator;
  int (*managed_tensor_from_py_object_no_sync)(void *object, DLManagedTensorVersioned **out);
  int (*managed_tensor_to_py_object_no_sync)(DLManagedTensorVersioned *tensor, void **out_object);
  int (*dltensor_from_py_object_no_sync)(void *object, DLTensor *out); /* borrowed: valid while `object` is untouched */
  int (*current_work_stream)(int32_t device_type, int32_t device_id, void **out_stream);
} DLPackExchangeAPI;

#ifdef __cplusplus
}
#endif

#endif /* EPMOE_DLPACK_ABI_H_ */
