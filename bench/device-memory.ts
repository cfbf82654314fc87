import { type Device, startPython } from 'epmoe'

/** MB. */
export interface Memory {
  rss: number
  /** What torch's tensors hold on the GPU, and what its allocator keeps for them. */
  allocated: number
  reserved: number
  /** The most that was allocated since peakFromNow(). */
  peak: number
}

export function memoryOf(device: Device): Memory {
  const of = (name: string) => (device === 'cpu' ? 0 : ask(name, device) / 1e6)
  return {
    rss: process.memoryUsage.rss() / 1e6,
    allocated: of('memory_allocated'),
    reserved: of('memory_reserved'),
    peak: of('max_memory_allocated'),
  }
}

export function peakFromNow(device: Device): void {
  if (device !== 'cpu') ask('reset_peak_memory_stats', device)
}

function ask(name: string, device: Device): number {
  using torch = startPython().import('torch')
  using cuda = torch.get('cuda')
  using value = cuda.method(name, device)
  return Number(value.toJS())
}
