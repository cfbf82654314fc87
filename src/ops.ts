import { native, type OpInfo, type OpParam } from './native.js'

export type { OpInfo, OpParam }

/** The library's ops as it describes them itself: parameters, axes, dtypes, defaults. Names are in snake_case. */
export function ops(): OpInfo[] {
  return native().ops()
}
