export type { PreparedCall, TensorLike } from './call.js'
export type { Device, DeviceLike } from './device.js'
export { cpuThreads, deviceFacts, devices, setCpuThreads } from './device.js'
export type { DType, TypedArray } from './dtype.js'
export { EpmoeError, PythonError } from './errors.js'
export * from './generated/ops.js'
export { Graph } from './graph.js'
export {
  isMigrated,
  type ScanBlocker,
  type ScanOptions,
  type ScanProblem,
  type ScanReport,
  type ScanSite,
  scan,
} from './migrate/scan.js'
export {
  Shim,
  type ShimEvent,
  ShimEvents,
  type ShimInstallation,
  type ShimInstallOptions,
  type ShimMode,
  type ShimRecordOptions,
  type ShimSettings,
  type ShimStats,
  shim,
} from './migrate/shim.js'
export type { MoeForwardArguments } from './moe/arguments.js'
export {
  type MoeActivation,
  type MoeLayer,
  type MoeLayerOptions,
  moeLayer,
} from './moe-layer.js'
export type { DeviceFacts, OpInfo, OpParam } from './native.js'
export { ops } from './ops.js'
export { float, kw } from './python/encode.js'
export { type JobOptions, job } from './python/executor.js'
export { type Keywords, proxyOf } from './python/proxy.js'
export { Python } from './python/python.js'
export { PyRef } from './python/ref.js'
export { type StartOptions, startPython } from './python/start.js'
export type { Torch, TorchCuda, TorchDevice, TorchDType, TorchTensor } from './python/torch.js'
export {
  type ExpertParallelLayer,
  type ExpertParallelOptions,
  expertParallel,
} from './ranks/expert-parallel.js'
export { type JoinOptions, joinRanks, type RankGroup } from './ranks/group.js'
export { scope } from './scope.js'
export { Event, type EventOptions, Stream } from './stream.js'
export { type Count, type Protocol, stats, Tensor, type TensorOptions } from './tensor.js'
