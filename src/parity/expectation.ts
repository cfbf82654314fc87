import { Tensor } from '../tensor.js'
import type { Bounds, Oracle, OracleOutput } from './case.js'

/** One output of an oracle while it is written: untouched elements are what poisoned memory reads as. */
export interface Page {
  expected: Float64Array
  scale: Float64Array
}

/** The truth of a call, gathered output by output. */
export class Expectation implements Oracle {
  readonly outputs: OracleOutput[] = []

  /** A float output; without bounds it has to agree to the bit. */
  floats(name: string, shape: number[], bounds?: Bounds): Page {
    return this.#page(name, shape, Number.NaN, bounds)
  }

  integers(name: string, shape: number[]): Page {
    return this.#page(name, shape, -1, undefined)
  }

  #page(name: string, shape: number[], untouched: number, bounds: Bounds | undefined): Page {
    const expected = Tensor.zeros(shape, { dtype: 'float64' })
    const scale = Tensor.zeros(shape, { dtype: 'float64' })
    this.outputs.push({ name, expected, scale, ...(bounds === undefined ? {} : { bounds }) })
    return {
      expected: (expected.data as Float64Array).fill(untouched),
      scale: scale.data as Float64Array,
    }
  }

  [Symbol.dispose](): void {
    for (const { expected, scale } of this.outputs) {
      expected.dispose()
      scale.dispose()
    }
  }
}
