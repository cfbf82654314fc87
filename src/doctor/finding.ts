/**
 * `fail`: the parity run on the CPU cannot do without it. `warn`: it is there, but not as it should be.
 * `absent`: not here, and not needed for that run.
 */
export type State = 'ok' | 'warn' | 'fail' | 'absent'

/** One thing that was looked at. */
export interface Finding {
  name: string
  state: State
  value: string
  /** The command, or the step, that mends it. */
  remedy?: string
}

/** Something users do with epmoe, and what stands in its way here. */
export interface Ability {
  name: string
  works: boolean
  /** Empty when it works. */
  why: string
}

export const ok = (name: string, value: string): Finding => ({ name, state: 'ok', value })
export const warn = (name: string, value: string, remedy: string): Finding => ({ name, state: 'warn', value, remedy })
export const fail = (name: string, value: string, remedy: string): Finding => ({ name, state: 'fail', value, remedy })
export const absent = (name: string, value: string, remedy: string): Finding => ({
  name,
  state: 'absent',
  value,
  remedy,
})
