import type { Device } from '../device.js'
import { kw } from '../python/encode.js'
import type { Python } from '../python/python.js'
import type { PyRef } from '../python/ref.js'
import type { Problem } from './case.js'
import type { Guarded } from './guard.js'

/** What a reference is like on this machine. */
export interface ReferenceFacts {
  name: string
  /** Null, or why it cannot run here. */
  problem: string | null
  version?: string
  /** Real GPU code rather than Triton's interpreter. */
  compiled?: boolean
  /** How it accumulates. */
  arithmetic?: 'input-dtype' | 'float32'
  sglang?: string
  generation?: string
}

export const referenceNames = ['float64', 'torch', 'triton', 'triton-float32', 'triton-original'] as const

/** An op's references that live in Python. */
export class PythonReferences {
  readonly #module: PyRef
  readonly #torch: PyRef

  constructor(python: Python) {
    this.#module = python.import('epmoe.references')
    this.#torch = python.import('torch')
  }

  describe(op: string): ReferenceFacts[] {
    const described = this.#module.method('describe', op).toJS() as Record<string, Omit<ReferenceFacts, 'name'>>
    return Object.entries(described).map(([name, facts]) => ({ name, ...facts }))
  }

  /** Triton's interpreter reads CPU memory only, and compiled Triton GPU memory only. */
  deviceFor(facts: ReferenceFacts, device: Device, gpu: Device | undefined): Device | undefined {
    if (facts.name === 'torch') return device
    return facts.compiled ? gpu : 'cpu'
  }

  /** Runs a reference on tensors that live where it can reach them; returns why it objects to this call, or null. */
  run(op: string, name: string, tensors: Record<string, Guarded>, scalars: Problem['scalars']): string | null {
    const refs = Object.entries(tensors).map(([key, { tensor }]) => [key, tensor.toTorch() as PyRef] as const)
    try {
      const args = { ...Object.fromEntries(refs), ...scalars }
      const objection = this.#module.method('objection', op, name, args).toJS() as string | null
      if (objection !== null) return objection
      this.#module.method('run', op, name, args).dispose()
      return null
    } finally {
      for (const [, ref] of refs) ref.dispose()
    }
  }

  /** Gives cached GPU memory back between large cases. */
  release(): void {
    if (this.#torch.get('cuda').method('is_available').toJS() === true)
      this.#torch.get('cuda').method('empty_cache', kw({}))
  }
}
