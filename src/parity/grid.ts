import type { GridOptions } from './case.js'
import { type Preset, presets } from './presets.js'

/** The shapes that options name: presets, or the product of sizes. */
export function shapesOf({ presets: names, hidden, topk, experts }: GridOptions): Preset[] {
  if (names.length > 0) return names.map((name) => presets[name]!)
  return cross({ hidden, topk, experts }).map((shape) => ({ ...shape, intermediate: shape.hidden }))
}

/** Every combination of one value of each key. */
export function cross<Values extends Record<string, readonly unknown[]>>(
  values: Values,
): { [Key in keyof Values]: Values[Key][number] }[] {
  return Object.entries(values).reduce<Record<string, unknown>[]>(
    (rows, [key, choices]) => rows.flatMap((row) => choices.map((choice) => ({ ...row, [key]: choice }))),
    [{}],
  ) as { [Key in keyof Values]: Values[Key][number] }[]
}
