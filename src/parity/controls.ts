import type { Case } from './case.js'
import { loadCases } from './run.js'

/** One standard case of each op and dtype among the cases, for when those are too small, or not made, to be spoiled. */
export async function controlCases(cases: readonly Case[]): Promise<Case[]> {
  const standard = (await loadCases()).flatMap((each) => each.standard())
  const wanted = new Set(cases.map(({ op, dtype }) => `${op}/${dtype}`))
  return [...wanted].flatMap(
    (key) => standard.find((each) => `${each.op}/${each.dtype}` === key && each.axes['T']! > 8) ?? [],
  )
}
