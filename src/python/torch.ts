// The part of torch that callers touch most, typed by hand so that an editor completes it. Every other attribute is
// there too: see TorchTensor's and Torch's last member.
import type { Device } from '../device.js'
import type { KeywordArguments } from './encode.js'

export type TorchDevice = Device | 'cuda' | 'meta' | (string & {})
type Kw = KeywordArguments
type Size = number | readonly number[]
type Operand = TorchTensor | number

/** A torch.dtype. */
export interface TorchDType {
  readonly itemsize: number
  readonly is_floating_point: boolean
}

/** A torch.Tensor. Methods are torch's own; what returns a number in Python returns one here. */
export interface TorchTensor extends Disposable, Iterable<TorchTensor | number> {
  readonly shape: number[]
  readonly dtype: TorchDType
  readonly ndim: number
  readonly nbytes: number
  readonly is_cuda: boolean
  readonly requires_grad: boolean
  readonly grad: TorchTensor | null
  readonly T: TorchTensor
  size(): number[]
  size(dim: number): number
  stride(): number[]
  numel(): number
  data_ptr(): number
  item(): number | boolean
  tolist(): unknown[]
  dim(): number
  element_size(): number
  is_contiguous(): boolean
  contiguous(): TorchTensor
  clone(): TorchTensor
  detach(): TorchTensor
  cpu(): TorchTensor
  cuda(device?: number): TorchTensor
  to(target: TorchDevice | TorchDType | TorchTensor, options?: TorchDType | Kw): TorchTensor
  type(dtype: TorchDType): TorchTensor
  float(): TorchTensor
  double(): TorchTensor
  half(): TorchTensor
  bfloat16(): TorchTensor
  int(): TorchTensor
  long(): TorchTensor
  bool(): TorchTensor
  view(...size: (Size | TorchDType)[]): TorchTensor
  reshape(...size: Size[]): TorchTensor
  flatten(start?: number, end?: number): TorchTensor
  squeeze(dim?: number): TorchTensor
  unsqueeze(dim: number): TorchTensor
  expand(...size: Size[]): TorchTensor
  permute(...dims: Size[]): TorchTensor
  transpose(a: number, b: number): TorchTensor
  t(): TorchTensor
  repeat(...times: Size[]): TorchTensor
  chunk(chunks: number, dim?: number): Iterable<TorchTensor>
  split(size: Size, dim?: number): Iterable<TorchTensor>
  narrow(dim: number, start: number, length: number): TorchTensor
  select(dim: number, index: number): TorchTensor
  index_select(dim: number, index: TorchTensor): TorchTensor
  gather(dim: number, index: TorchTensor): TorchTensor
  masked_fill(mask: TorchTensor, value: Operand): TorchTensor
  add(other: Operand, options?: Kw): TorchTensor
  sub(other: Operand, options?: Kw): TorchTensor
  mul(other: Operand): TorchTensor
  div(other: Operand, options?: Kw): TorchTensor
  pow(exponent: Operand): TorchTensor
  neg(): TorchTensor
  abs(): TorchTensor
  exp(): TorchTensor
  log(): TorchTensor
  sqrt(): TorchTensor
  rsqrt(): TorchTensor
  sigmoid(): TorchTensor
  tanh(): TorchTensor
  relu(): TorchTensor
  softmax(dim: number): TorchTensor
  clamp(min?: number | null, max?: number | null): TorchTensor
  matmul(other: TorchTensor): TorchTensor
  mm(other: TorchTensor): TorchTensor
  bmm(other: TorchTensor): TorchTensor
  sum(dim?: Size, keepdim?: boolean): TorchTensor
  mean(dim?: Size, keepdim?: boolean): TorchTensor
  std(dim?: Size): TorchTensor
  norm(p?: number): TorchTensor
  amax(dim?: Size, keepdim?: boolean): TorchTensor
  amin(dim?: Size, keepdim?: boolean): TorchTensor
  max(): TorchTensor
  min(): TorchTensor
  argmax(dim?: number): TorchTensor
  cumsum(dim: number): TorchTensor
  topk(k: number, dim?: number): Iterable<TorchTensor>
  sort(dim?: number, descending?: boolean): Iterable<TorchTensor>
  eq(other: Operand): TorchTensor
  ne(other: Operand): TorchTensor
  gt(other: Operand): TorchTensor
  ge(other: Operand): TorchTensor
  lt(other: Operand): TorchTensor
  le(other: Operand): TorchTensor
  isnan(): TorchTensor
  isfinite(): TorchTensor
  any(): TorchTensor
  all(): TorchTensor
  equal(other: TorchTensor): boolean
  zero_(): TorchTensor
  fill_(value: number): TorchTensor
  copy_(source: TorchTensor): TorchTensor
  add_(other: Operand): TorchTensor
  mul_(other: Operand): TorchTensor
  normal_(mean?: number, std?: number): TorchTensor
  uniform_(from?: number, to?: number): TorchTensor
  requires_grad_(requires?: boolean): TorchTensor
  backward(gradient?: TorchTensor): void
  // biome-ignore lint/suspicious/noExplicitAny: torch has hundreds more, and they work
  [attribute: string]: any
}

export interface TorchCuda {
  is_available(): boolean
  device_count(): number
  current_device(): number
  set_device(device: number): void
  get_device_name(device?: number): string
  get_device_capability(device?: number): [number, number]
  synchronize(device?: number): void
  empty_cache(): void
  memory_allocated(device?: number): number
  max_memory_allocated(device?: number): number
  reset_peak_memory_stats(device?: number): void
  // biome-ignore lint/suspicious/noExplicitAny: streams, graphs, events and the rest
  [attribute: string]: any
}

type Create = (...sizeAndKeywords: (Size | Kw)[]) => TorchTensor

/** The module torch, as `python.torch()` gives it. */
export interface Torch {
  readonly __version__: string
  readonly float32: TorchDType
  readonly float64: TorchDType
  readonly float16: TorchDType
  readonly bfloat16: TorchDType
  readonly float8_e4m3fn: TorchDType
  readonly int8: TorchDType
  readonly uint8: TorchDType
  readonly int32: TorchDType
  readonly int64: TorchDType
  readonly bool: TorchDType
  readonly cuda: TorchCuda
  readonly zeros: Create
  readonly ones: Create
  readonly empty: Create
  readonly rand: Create
  readonly randn: Create
  full(size: readonly number[], value: number, options?: Kw): TorchTensor
  tensor(data: unknown, options?: Kw): TorchTensor
  as_tensor(data: unknown, options?: Kw): TorchTensor
  frombuffer(buffer: ArrayBufferView, options: Kw): TorchTensor
  arange(...bounds: (number | Kw)[]): TorchTensor
  linspace(start: number, end: number, steps: number, options?: Kw): TorchTensor
  eye(n: number, options?: Kw): TorchTensor
  randint(low: number, high: number, size: readonly number[], options?: Kw): TorchTensor
  randperm(n: number, options?: Kw): TorchTensor
  zeros_like(tensor: TorchTensor, options?: Kw): TorchTensor
  ones_like(tensor: TorchTensor, options?: Kw): TorchTensor
  empty_like(tensor: TorchTensor, options?: Kw): TorchTensor
  cat(tensors: readonly TorchTensor[], dim?: number): TorchTensor
  stack(tensors: readonly TorchTensor[], dim?: number): TorchTensor
  where(condition: TorchTensor, a: Operand, b: Operand): TorchTensor
  matmul(a: TorchTensor, b: TorchTensor): TorchTensor
  mm(a: TorchTensor, b: TorchTensor): TorchTensor
  bmm(a: TorchTensor, b: TorchTensor): TorchTensor
  einsum(equation: string, ...tensors: TorchTensor[]): TorchTensor
  softmax(tensor: TorchTensor, dim: number): TorchTensor
  topk(tensor: TorchTensor, k: number, dim?: number): Iterable<TorchTensor>
  sort(tensor: TorchTensor, options?: Kw): Iterable<TorchTensor>
  allclose(a: TorchTensor, b: TorchTensor, options?: Kw): boolean
  equal(a: TorchTensor, b: TorchTensor): boolean
  manual_seed(seed: number): unknown
  set_num_threads(threads: number): void
  get_num_threads(): number
  is_grad_enabled(): boolean
  no_grad(): object
  inference_mode(): object
  device(name: TorchDevice): object
  // biome-ignore lint/suspicious/noExplicitAny: torch has hundreds more, and they work
  [attribute: string]: any
}
