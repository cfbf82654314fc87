/* libepmoe: the C contract.
 *
 * Callers (the Node addon, the Python front end, your own program) see this header and nothing else. The library knows
 * tensors only as DLTensors, never throws or longjmps across this boundary, never allocates an op's output and never
 * synchronises with a device unless the function's name says so.
 *
 * Errors: every function that can fail returns an epmoe_status. Anything but EPMOE_OK leaves a description in
 * thread-local storage, read with epmoe_last_error() on the same thread before the next call into the library.
 *
 * Threads: every function may be called from any thread. Objects passed as EPMOE_VALUE_OBJECT require whatever lock
 * their runtime demands (for Python: the GIL) to be held by the caller. */
#ifndef EPMOE_H_
#define EPMOE_H_

#include <stddef.h>
#include <stdint.h>

#include "dlpack_abi.h"

#if defined(_WIN32)
#define EPMOE_API __declspec(dllexport)
#else
#define EPMOE_API __attribute__((visibility("default")))
#endif

#ifdef __cplusplus
extern "C" {
#endif

/* Raised when a struct or a function below changes incompatibly; callers compare it with epmoe_abi_version(). */
#define EPMOE_ABI_VERSION 2
EPMOE_API int32_t epmoe_abi_version(void);
/* The package's version, e.g. "0.1.0". */
EPMOE_API const char *epmoe_version(void);

/* ---------------------------------------------------------------- status */

typedef int32_t epmoe_status;
enum {
  EPMOE_OK = 0,
  /* mistakes of the caller */
  EPMOE_ERR_UNKNOWN_OP,
  EPMOE_ERR_MISSING_ARGUMENT,
  EPMOE_ERR_UNEXPECTED_ARGUMENT,
  EPMOE_ERR_NOT_A_TENSOR,
  EPMOE_ERR_UNSUPPORTED_TENSOR, /* sparse, quantised, meta, conjugate, requires grad, managed memory ... */
  EPMOE_ERR_DTYPE,
  EPMOE_ERR_RANK,
  EPMOE_ERR_SHAPE,
  EPMOE_ERR_NOT_CONTIGUOUS,
  EPMOE_ERR_MISALIGNED,
  EPMOE_ERR_DEVICE,
  EPMOE_ERR_OVERLAP,
  EPMOE_ERR_READ_ONLY,
  EPMOE_ERR_VALUE,
  EPMOE_ERR_INDEX_OUT_OF_RANGE, /* an index value inside a tensor; the slot was skipped */
  EPMOE_ERR_CAPTURE,            /* something that a CUDA graph cannot hold, or a capture used wrongly */
  /* the machine */
  EPMOE_ERR_NO_CUDA,
  EPMOE_ERR_CUDA,
  EPMOE_ERR_CUDA_LOST, /* a kernel failed: nothing of this process works on the GPU any more */
  EPMOE_ERR_OUT_OF_MEMORY,
  /* ours: a bug in epmoe, please report it */
  EPMOE_ERR_INTERNAL,
  EPMOE_STATUS_COUNT
};
/* The stable code users match on, e.g. "ERR_SHAPE". */
EPMOE_API const char *epmoe_status_code(epmoe_status status);

typedef struct epmoe_error {
  epmoe_status status;
  const char *op;       /* "" where none is concerned; every string is non-NULL */
  const char *argument; /* the op's own (snake_case) name of the argument */
  const char *expected;
  const char *received;
  const char *hint;    /* how to mend it */
  const char *message; /* one sentence made of the above */
} epmoe_error;
/* The last failure on this thread; valid until the next call into the library on this thread. */
EPMOE_API const epmoe_error *epmoe_last_error(void);

/* ---------------------------------------------------------------- dtypes */

enum {
  EPMOE_FLOAT32 = 0,
  EPMOE_FLOAT16,
  EPMOE_BFLOAT16,
  EPMOE_FLOAT8_E4M3FN,
  EPMOE_INT32,
  EPMOE_INT64,
  EPMOE_UINT8,
  EPMOE_FLOAT64,
  EPMOE_DTYPE_COUNT
};
typedef struct epmoe_dtype_info {
  const char *name; /* as in torch: "bfloat16" */
  DLDataType dl;
  int32_t itemsize; /* bytes */
} epmoe_dtype_info;
/* NULL when `dtype` is none of the above. */
EPMOE_API const epmoe_dtype_info *epmoe_dtype_at(int32_t dtype);
/* The dtype of a DLPack type, or -1 when epmoe has none for it. */
EPMOE_API int32_t epmoe_dtype_of(DLDataType dl);

/* ---------------------------------------------------------------- the op table */

enum { EPMOE_KIND_TENSOR = 0, EPMOE_KIND_INT, EPMOE_KIND_FLOAT, EPMOE_KIND_ENUM };
enum { EPMOE_ROLE_IN = 0, EPMOE_ROLE_OUT };

typedef struct epmoe_param {
  const char *name; /* snake_case */
  const char *doc;  /* one sentence */
  int32_t kind;
  int32_t role;     /* tensors only */
  int32_t optional; /* 1: may be absent; scalars then take default_value */
  /* Tensors. `shape` names the axes, outermost first: "T,H". "T*K" is one axis of that length, as "2*I" and "E+1" are;
   * "...R,H" folds any number of leading axes into R, and "|" separates alternatives. Axes of one name have one length
   * throughout a call. */
  const char *shape;
  uint32_t dtypes;    /* bit (1 << dtype) for every dtype allowed outright */
  int32_t dtype_like; /* index of the parameter whose dtype is allowed as well, or -1 */
  /* Scalars. Enums count their choices from 0. Integers are exact up to 2^53. */
  double default_value;
  double min_value;
  double max_value;
  const char *const *choices; /* enums only */
  int32_t n_choices;
} epmoe_param;

typedef struct epmoe_op_info {
  const char *name;
  const char *doc;
  const epmoe_param *params;
  int32_t n_params;
  int32_t has_cuda; /* 1 when this build of the library carries its CUDA kernel */
} epmoe_op_info;

EPMOE_API int32_t epmoe_op_count(void);
/* In order of name; NULL past the end. The pointer is valid for the life of the process. */
EPMOE_API const epmoe_op_info *epmoe_op_at(int32_t index);
/* NULL when there is no such op. */
EPMOE_API const epmoe_op_info *epmoe_op_find(const char *name);

/* ---------------------------------------------------------------- calling an op */

enum {
  EPMOE_VALUE_NONE = 0, /* argument absent */
  EPMOE_VALUE_TENSOR,   /* as.tensor: borrowed for the length of the call */
  EPMOE_VALUE_FOREIGN,  /* as.tensor, whose memory belongs to the framework of epmoe_set_exchange() */
  EPMOE_VALUE_OBJECT,   /* as.object: a tensor object of that framework, of the type its table was taken from */
  EPMOE_VALUE_INT,      /* as.i; enums too */
  EPMOE_VALUE_FLOAT,    /* as.f */
};
typedef struct epmoe_value {
  int32_t kind;
  union {
    const DLTensor *tensor;
    void *object;
    int64_t i;
    double f;
  } as;
} epmoe_value;

/* The table by which EPMOE_VALUE_OBJECT is read and the framework's current stream is found. It must stay valid for the
 * life of the process; NULL forgets it. Fails with EPMOE_ERR_VALUE when its major version is not ours. */
EPMOE_API epmoe_status epmoe_set_exchange(const DLPackExchangeAPI *api);

/* The stream an op runs on. AUTO: the framework's current stream when any tensor is FOREIGN or an OBJECT, otherwise
 * the library's own stream of the device. Ignored for CPU tensors. */
enum { EPMOE_STREAM_AUTO = 0, EPMOE_STREAM_GIVEN };

/* Checks every argument against the op's parameters, then runs it on the tensors' device: on the CPU before returning,
 * on CUDA by launching on the stream. Nothing is written when a check fails. Values are positional, in the order of
 * `params`; scalars absent take their default.
 * EPMOE_ERR_INDEX_OUT_OF_RANGE from the CPU means the op has finished and skipped the offending slots; on CUDA that
 * is found by the next epmoe_stream_synchronize() or epmoe_check(). */
EPMOE_API epmoe_status epmoe_invoke(const epmoe_op_info *op, const epmoe_value *values, int32_t n_values,
                                    int32_t stream_mode, void *stream);

/* A call whose arguments have been checked once, to be made many times. The memory of its tensors must outlive it;
 * their contents may change between runs. */
typedef struct epmoe_prepared epmoe_prepared;
EPMOE_API epmoe_status epmoe_prepare(const epmoe_op_info *op, const epmoe_value *values, int32_t n_values,
                                     epmoe_prepared **out);
/* As epmoe_invoke() without its checks. */
EPMOE_API epmoe_status epmoe_prepared_run(const epmoe_prepared *prepared, int32_t stream_mode, void *stream);
EPMOE_API void epmoe_prepared_free(epmoe_prepared *prepared);

/* ---------------------------------------------------------------- devices, streams */

EPMOE_API int32_t epmoe_cuda_compiled(void);
/* 0 when there is no usable driver; epmoe_last_error() then holds the reason when CUDA is compiled in. */
EPMOE_API int32_t epmoe_cuda_device_count(void);

typedef struct epmoe_device_facts {
  char name[128];
  int32_t cc_major, cc_minor;
  int32_t sm_count;
  int32_t driver_version, runtime_version; /* as CUDA counts: 13000 is 13.0 */
  int64_t l2_bytes;
  int64_t total_bytes;
} epmoe_device_facts;
EPMOE_API epmoe_status epmoe_device_query(int32_t device_id, epmoe_device_facts *out);

/* Whether kernels on `device_id` may read and write memory of `peer_id` directly: 1 or 0 in `*out`. */
EPMOE_API epmoe_status epmoe_peer_access(int32_t device_id, int32_t peer_id, int32_t *out);

EPMOE_API epmoe_status epmoe_stream_create(int32_t device_id, void **out);
EPMOE_API epmoe_status epmoe_stream_destroy(int32_t device_id, void *stream);
/* The library's own stream of that device (made on first use, never destroyed). */
EPMOE_API epmoe_status epmoe_stream_own(int32_t device_id, void **out);
/* The framework's current stream there; EPMOE_ERR_VALUE without an exchange table. */
EPMOE_API epmoe_status epmoe_stream_foreign(int32_t device_id, void **out);
/* Makes work launched on `stream`, of `device_id`, from now on wait for what `awaited` holds now. Blocks nobody. A
 * stream that is being captured, by whomever, can wait for no other: EPMOE_ERR_CAPTURE, unless that other has nothing
 * left to do. */
EPMOE_API epmoe_status epmoe_stream_wait(int32_t device_id, void *stream, int32_t awaited_device_id, void *awaited);
/* Waits for the stream, then behaves as epmoe_check(). Blocks the calling thread. */
EPMOE_API epmoe_status epmoe_stream_synchronize(int32_t device_id, void *stream);
/* Takes the first index error that kernels finished so far on this device have reported, if any, and clears it. */
EPMOE_API epmoe_status epmoe_check(int32_t device_id);

/* Events: a point in a stream's work. One belongs to a device and is recorded on its streams, again and again; any
 * device's stream may wait for it. One that was never recorded counts as done. Recording, and waiting, on a stream that
 * is being captured is EPMOE_ERR_CAPTURE. `timed`: 1 when epmoe_event_elapsed() is to be asked. */
EPMOE_API epmoe_status epmoe_event_create(int32_t device_id, int32_t timed, void **out);
EPMOE_API void epmoe_event_destroy(int32_t device_id, void *event);
EPMOE_API epmoe_status epmoe_event_record(int32_t device_id, void *event, void *stream);
/* Makes work launched on `stream`, of device `device_id`, from now on wait for the event as it was last recorded. */
EPMOE_API epmoe_status epmoe_stream_wait_event(int32_t device_id, void *stream, void *event);
/* 1 or 0 in `*out`. */
EPMOE_API epmoe_status epmoe_event_query(int32_t device_id, void *event, int32_t *out);
/* Waits for the event, then behaves as epmoe_check(). Blocks the calling thread. */
EPMOE_API epmoe_status epmoe_event_synchronize(int32_t device_id, void *event);
/* Milliseconds between two events that are done; EPMOE_ERR_VALUE otherwise. */
EPMOE_API epmoe_status epmoe_event_elapsed(int32_t device_id, void *begin, void *end, double *out);

/* ---------------------------------------------------------------- graphs */

/* A captured CUDA graph: ops launched once and recorded, to be launched again by one call. */
typedef struct epmoe_graph epmoe_graph;
/* From now on what this thread launches through the library on `stream` is recorded instead of run: ops (without a
 * stream of their own, or with this one) and copies between GPUs and page-locked memory. Ops on the CPU, other streams,
 * copies of pageable memory and waiting for a stream are refused with EPMOE_ERR_CAPTURE, which leaves the capture as it
 * was. Other threads are not affected. The default stream (NULL) cannot be captured. */
EPMOE_API epmoe_status epmoe_capture_begin(int32_t device_id, void *stream);
/* Ends the capture of this thread, whatever state it is in. NULL drops what was recorded. Every tensor that was used
 * must outlive the graph; a prepared call may go. */
EPMOE_API epmoe_status epmoe_capture_end(epmoe_graph **out);
/* Launches the graph on any stream of its device. It reads what the tensors hold by then; indices out of range are
 * found as those of epmoe_invoke() are. Launches of one graph follow one another, on whichever streams they are. */
EPMOE_API epmoe_status epmoe_graph_replay(epmoe_graph *graph, void *stream);
/* Launches under way are not disturbed. NULL is ignored. */
EPMOE_API void epmoe_graph_free(epmoe_graph *graph);

/* ---------------------------------------------------------------- memory */

/* Memory of kDLCPU (64-byte aligned), kDLCUDA or kDLCUDAHost. 0 bytes give NULL. epmoe_free waits for the device. */
EPMOE_API epmoe_status epmoe_alloc(DLDevice device, size_t nbytes, void **out);
EPMOE_API epmoe_status epmoe_free(DLDevice device, void *data);
/* Between host and device or on one device. Only-host copies are done on return; the others are ordered on `stream`. */
EPMOE_API epmoe_status epmoe_copy(void *dst, DLDevice dst_device, const void *src, DLDevice src_device, size_t nbytes,
                                  void *stream);

/* How many threads CPU ops use: 0 restores the default (the cores this process may run on). */
EPMOE_API void epmoe_set_cpu_threads(int32_t count);
EPMOE_API int32_t epmoe_cpu_threads(void);

/* ---------------------------------------------------------------- parity */

/* How far an op's result is from a reference's. A NaN equals a NaN of any payload; infinities must agree in sign. */
typedef struct epmoe_metrics {
  int64_t mismatched; /* elements whose bits differ from the reference's, rounded to the dtype of `actual` */
  int64_t total;
  double max_ulp; /* largest |actual - reference| in units in the last place, at the magnitude `scale` gives */
  double max_abs;
  double rel_l2;           /* |actual - oracle| / |oracle|, Euclidean norms over the finite part of the oracle */
  double reference_rel_l2; /* the same of the reference, rounded */
} epmoe_metrics;

/* Compares CPU tensors of one element count: `actual` of any dtype but float64; `reference` of the same dtype or
 * float64; `oracle` (the truth) and `scale` float64. `scale` is the magnitude at which an ulp is taken, e.g. the sum of
 * the terms' absolute values, which cancellation does not shrink. */
EPMOE_API epmoe_status epmoe_compare(const DLTensor *actual, const DLTensor *reference, const DLTensor *oracle,
                                     const DLTensor *scale, epmoe_metrics *out);

/* Fills a CPU tensor of any dtype but float64 with bell-shaped values of mean 0 and deviation `scale`. Element i
 * depends on the seed and on i alone, so the data is the same on every machine. */
EPMOE_API epmoe_status epmoe_fill_normal(const DLTensor *tensor, uint64_t seed, double scale);

#ifdef __cplusplus
}
#endif

#endif /* EPMOE_H_ */
