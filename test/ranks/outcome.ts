/** Squared errors against float64, summed over a rank's elements. */
export interface Sums {
  ranks: number
  single: number
  plain: number
  /** By the shapes of the matrix products: test/helpers/moe_layer.py. */
  attainable: number[]
  exact: number
  elements: number
}

export interface Outcome extends Sums {
  name: string
  /** A spoilt call, whose comparison must fail. */
  control?: true
}

/** What one rank writes. */
export interface Report {
  outcomes: Outcome[]
  errors: Record<string, { code: string; message: string }>
}
