/** Colours of a terminal, down to none. */

export interface Color {
  readonly rgb: readonly [red: number, green: number, blue: number]
  /** The nearest of the terminal's own sixteen, 0 to 15. */
  readonly ansi: number
}

/** Bits of colour, as `tty.WriteStream.getColorDepth()` gives them. */
export type ColorDepth = 1 | 4 | 8 | 24

const CUBE: readonly number[] = [0, 95, 135, 175, 215, 255]

const nearestCubeStep = (value: number): number =>
  CUBE.reduce((best, level, index) => (Math.abs(level - value) < Math.abs((CUBE[best] ?? 0) - value) ? index : best), 0)

function code({ rgb, ansi }: Color, depth: ColorDepth, background: boolean): string {
  const base = background ? 48 : 38
  if (depth === 24) return `${base};2;${rgb.join(';')}`
  if (depth === 8) {
    const [red, green, blue] = rgb.map(nearestCubeStep)
    return `${base};5;${16 + 36 * (red ?? 0) + 6 * (green ?? 0) + (blue ?? 0)}`
  }
  return String((ansi < 8 ? 30 : 82) + ansi + (background ? 10 : 0))
}

/** The text in a foreground and, if given, a background colour. */
export function paint(text: string, depth: ColorDepth, foreground: Color, background?: Color): string {
  if (depth === 1) return text
  const codes = [code(foreground, depth, false), ...(background ? [code(background, depth, true)] : [])]
  return `\u001b[${codes.join(';')}m${text}\u001b[0m`
}

export const bold = (text: string, depth: ColorDepth): string => (depth === 1 ? text : `\u001b[1m${text}\u001b[0m`)
export const dim = (text: string, depth: ColorDepth): string => (depth === 1 ? text : `\u001b[2m${text}\u001b[0m`)

/** Colours mixed by weight; where they cannot be mixed, the heaviest. */
export function mix(parts: readonly (readonly [color: Color, weight: number])[]): Color {
  const total = parts.reduce((sum, [, weight]) => sum + weight, 0) || 1
  const channel = (index: 0 | 1 | 2): number =>
    Math.round(parts.reduce((sum, [{ rgb }, weight]) => sum + rgb[index] * weight, 0) / total)
  const [heaviest] = [...parts].sort(([, a], [, b]) => b - a)
  return { rgb: [channel(0), channel(1), channel(2)], ansi: heaviest?.[0].ansi ?? 0 }
}

/** What a stream can show, with NO_COLOR and FORCE_COLOR as everywhere. */
export function colorDepthOf(
  stream: { readonly isTTY?: boolean; getColorDepth?(env?: object): number },
  env: Readonly<Record<string, string | undefined>>,
): ColorDepth {
  if (env['NO_COLOR']) return 1
  const forced = env['FORCE_COLOR']
  if (!stream.isTTY) return forced !== undefined && forced !== '0' && forced !== 'false' ? 24 : 1
  const depth = stream.getColorDepth?.(env) ?? 1
  return depth === 24 || depth === 8 || depth === 4 ? depth : 1
}
